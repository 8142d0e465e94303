"""``solvus init``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Of the study to write."""
    parser.add_argument("name", help="of the study")
    parser.add_argument("--dir", default=".", help="write DIR/study/NAME.yaml (default the current folder)")
    parser.add_argument("--model", default="digits", help="the plug-in to start from (default digits)")


def call(args: Any) -> int:
    """``solvus init NAME``."""
    import shlex

    from orchestrator import first_study

    path = first_study.write(args.name, args.dir, args.model)
    again = shlex.join([f"study={args.name}", "--config-dir", args.dir])
    text = f"{path}: edit it, then\n  solvus plan {again}\n  solvus run {again}"
    emit(args, {"file": str(path), "plan": f"solvus plan {again}", "run": f"solvus run {again}"}, text)
    return COMPLETE


VERB = Verb("write a commented study of your own, to edit and to run", call, options)
