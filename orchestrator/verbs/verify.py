"""``solvus verify``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.exits import COMPLETE, FAILED
from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """What becomes of damage."""
    parser.add_argument("--withdraw", action="store_true", help="withdraw what is damaged, so that it is made again")


def call(args: Any) -> int:
    """``solvus verify``."""
    from orchestrator.store import Store

    root, _ = root_and_name(args)
    counts, wrong = Store(root, create=False).verify(withdraw=args.withdraw)
    text = f"{counts['files']:,} files, {counts['bytes'] / 1e6:,.1f} MB read, {len(wrong)} wrong"
    emit(args, counts | {"wrong": wrong}, "\n".join([text, *(f"  {line}" for line in wrong)]))
    return FAILED if wrong else COMPLETE


VERB = Verb(
    "read every byte in the store, the cache of states apart, and say what is wrong", call, options, takes_settings=True
)
