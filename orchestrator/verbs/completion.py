"""``solvus completion SHELL``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Which shell, or the line it asks about."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    parser.add_argument("--line", metavar="TEXT", help="print what may follow this command line, for the script")


def call(args: Any) -> int:
    """``solvus completion SHELL``."""
    from orchestrator import cli
    from orchestrator.completion import INSTALL, SCRIPTS, candidates

    if args.line is not None:
        found = candidates(args.line, cli.verbs_of(cli.parser()), args.shell)
        emit(args, found, "\n".join(found))
        return COMPLETE
    script = f"# To have it in every {args.shell}: {INSTALL[args.shell]}\n{SCRIPTS[args.shell]}"
    if args.shell == "zsh":
        script = f"{SCRIPTS['zsh']}# To have it in every zsh: {INSTALL['zsh']}\n"  # '#compdef' must come first
    emit(args, {"shell": args.shell, "script": script}, script.rstrip())
    return COMPLETE


VERB = Verb("a script with which a shell completes verbs, plug-ins, fields and studies", call, options)
