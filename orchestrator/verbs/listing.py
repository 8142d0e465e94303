"""``solvus list``."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Which."""
    parser.add_argument("kind", nargs="?", help="model, solver, times, guidance, strategy, reward, features, metric, "
                        "search, executor, tracker or study")  # fmt: skip


def call(args: Any) -> int:
    """``solvus list``."""
    from orchestrator import config
    from orchestrator.registries import EVERY
    from tasks.registry import unknown

    kinds = [*EVERY, "study"]
    if args.kind is not None and args.kind.rstrip("s") not in [k.rstrip("s") for k in kinds]:
        raise unknown("kind", args.kind, kinds, "Kinds")
    data: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if args.kind is None or kind.rstrip("s") == args.kind.rstrip("s"):
            if kind == "study":
                data[kind] = {name: _first_comment(path) for name, path in config.studies().items()}
            else:
                data[kind] = {name: _summary(EVERY[kind].get(name)) for name in EVERY[kind].names()}
    lines = []
    for kind, entries in data.items():
        lines += [kind, *(f"  {name:<18} {summary}" for name, summary in entries.items())]
    emit(args, data, "\n".join(lines))
    return COMPLETE


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _first_comment(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0].lstrip("# ") if lines else ""


VERB = Verb("every registered plug-in, or those of one kind", call, options)
