"""``solvus gc``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """What goes."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--older-than-s", type=float, default=3600.0, metavar="SECONDS",
                        help="spare younger files, which a worker may be about to commit (default 3600)")  # fmt: skip
    parser.add_argument(
        "--states", action="store_true", help="also drop all states that trials with equal beginnings share"
    )
    parser.add_argument("--release", action="store_true", help="also take rows out of quarantine, to try them again")


def call(args: Any) -> int:
    """``solvus gc``."""
    from orchestrator.files import is_remote
    from orchestrator.store import Store

    root, _ = root_and_name(args)
    removed = Store(root, create=False).collect_garbage(args.older_than_s, args.dry_run, args.release)
    if args.states and not is_remote(root):
        from orchestrator.states import StateCache

        files, size = StateCache(root, 0).clear(args.dry_run)
        removed["files"] += files
        removed["bytes"] += size
    done = "would go" if args.dry_run else "gone"
    text = f"{removed['files']:,} orphans, {removed['bytes'] / 1e6:,.1f} MB {done}; {removed['released']} rows released"
    emit(args, removed, text)
    return COMPLETE


VERB = Verb("remove orphans from the store: what no commit record names", call, options, takes_settings=True)
