"""``solvus chaos``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE, FAILED
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """How many faults, and where."""
    parser.add_argument("--faults", type=int, default=220, help="faults without a cluster (default 220)")
    parser.add_argument("--ray-kills", type=int, default=100, help="kills on a real Ray cluster of several nodes here "
                        "(default 100, which takes about a quarter of an hour; 0 leaves Ray out)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", metavar="DIR", help="work here and keep it, instead of a temporary folder")


def call(args: Any) -> int:
    """``solvus chaos``."""
    from orchestrator import chaos as suite
    from orchestrator.origin import origin

    if args.faults < 1 or args.ray_kills < 0:
        raise ValueError(
            f"--faults must be at least 1 and --ray-kills at least 0, got {args.faults}, {args.ray_kills}."
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="solvus-chaos-") as temporary:
        folder = Path(args.keep) if args.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tallies = suite.suite(folder, args.faults, args.ray_kills, args.seed, say)
    together = suite.total(tallies)
    values = {
        "faults": (together.faults, "faults", "higher"),
        "lost": (together.lost, "rows", "lower"),
        "duplicated": (together.duplicated, "rows", "lower"),
        "different": (together.different, "rows", "lower"),
        "wasted_shards_per_kill": (together.recomputed / max(together.killed_workers, 1), "shards", "lower"),
    }
    figures = [{"name": n, "value": v, "unit": unit, "better": better} for n, (v, unit, better) in values.items()]
    data = {"figures": figures, "commit": origin()["commit"], "machine": origin()["machine"]}
    emit(args, data, suite.table(tallies))
    broken = together.lost + together.duplicated + together.different
    return FAILED if broken or any(tally.notes for tally in tallies) else COMPLETE


VERB = Verb("inject faults into a small study and show that nothing is lost, doubled or changed", call, options)
