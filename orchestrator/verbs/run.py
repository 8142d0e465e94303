"""``solvus run``."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from orchestrator.exits import COMPLETE, DEGRADED, FAILED
from orchestrator.verbs.printing import emit, is_shown, log_to_stderr
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Instead of settings."""
    parser.add_argument("--frozen", metavar="FILE", help="a composed configuration as JSON instead of settings")


def call(args: Any) -> int:
    """Run a study, or continue it.

    Raises:
        ValueError: a frozen configuration beside settings, which it would not heed.
    """
    from dashboards.report import build
    from orchestrator import config
    from orchestrator.launch import launch

    log_to_stderr()
    if args.frozen:
        beside = [*args.overrides, *(["--config-dir"] if args.config_dir else []), *(["--cfg"] if args.cfg else [])]
        if beside:
            raise ValueError(
                f"--frozen {args.frozen} is a whole configuration and takes nothing beside it, got {' '.join(beside)}. "
                "Change the file, or leave --frozen out."
            )
        study = config.load(args.frozen)
    else:
        data = config.compose(args.overrides, args.config_dir)
        if is_shown(args, data):
            return COMPLETE
        study = config.study(data)
    summary, lines = launch(study, _command(args), build.write)
    emit(args, summary, "\n".join(lines))
    return {"failed": FAILED, "degraded": DEGRADED}.get(summary["state"], COMPLETE)


def _command(args: Any) -> str:
    """What to type to launch it again."""
    folders = [word for folder in args.config_dir for word in ("--config-dir", folder)]
    frozen = ["--frozen", args.frozen] if args.frozen else []
    return shlex.join(["solvus", "run", *frozen, *folders, *args.overrides])


VERB = Verb(
    "run a study, or continue it: the same command again is the resume",
    call,
    options,
    takes_settings=True,
    composes=True,
)
