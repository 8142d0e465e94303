"""Planning and scheduling a million shards in one driver, and scanning a large store.

plan_rate_per_s   shards planned, submitted and settled a second, with an executor and a store that do nothing
plan_memory_mb    peak memory of that driver
resume_scan_s     finding 100,000 committed shards of one recipe on local disk
"""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, options, publish


class NothingExecutor:
    """Settles every task at once."""

    slots = 64

    def submit(self, function: Any, task: Any) -> Future:
        """Done."""
        future: Future = Future()
        future.set_result({"rows": task.stop - task.start, "nfe": 0})
        return future

    def close(self) -> None:
        """Nothing to end."""


def plan_many(shards: int) -> tuple[float, float]:
    """Shards a second through the study's own loop, and peak memory in MB, in this process."""
    from orchestrator import config, study
    from orchestrator.ledger import Ledger
    from orchestrator.progress import Progress
    from orchestrator.registries import trackers
    from orchestrator.store import Store

    # One row a shard, so that a million shards are a plan of a million rows.
    with tempfile.TemporaryDirectory() as root:
        data = config.compose(["model=gmm", "tracker=none", f"root={root}", f"num_samples={shards}", "shard_size=1"])
        work = config.study(data)
        study.measure = lambda *arguments: ({}, {})  # nothing was made, so there is nothing to measure
        began = time.perf_counter()
        watch = Progress(stream=io.StringIO())
        study.run(work, NothingExecutor(), Store(root), trackers.build("none"), watch, Ledger(), [])
        rate = shards / (time.perf_counter() - began)
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resume_scan(shards: int, root: Path) -> float:
    """Seconds to find what is missing when ``shards`` ranges are committed."""
    from orchestrator.plan import covered, missing
    from orchestrator.store import Record, Store

    store, key = Store(root), "ab" + "0" * 30
    folder = root / "store" / store.folder("rows", key)
    folder.mkdir(parents=True)
    for i in range(shards):
        span = f"{i * 32:010d}-{i * 32 + 32:010d}"
        (folder / f"{span}.00000000.parquet").write_bytes(b"x")
        record = Record(i * 32, i * 32 + 32, f"{span}.00000000.parquet", 1, 32, "0" * 64)
        (folder / f"{span}.json").write_bytes(record.to_bytes())
    began = time.perf_counter()
    gaps = missing(0, shards * 32 + 32, covered(store.committed("rows", key)))
    elapsed = time.perf_counter() - began
    assert gaps == [(shards * 32, shards * 32 + 32)], gaps
    return elapsed


def main() -> None:
    """Measure everything in one run; planning in a process of its own, for its memory."""
    args = options(__doc__ or "")
    shards = 20_000 if args.quick else 1_000_000
    script = f"from benchmarks.scale import plan_many; print(*plan_many({shards}))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    rate, memory = map(float, done.stdout.split())
    with tempfile.TemporaryDirectory() as folder:
        scan = resume_scan(5_000 if args.quick else 100_000, Path(folder))
    figures = [
        Figure("plan_rate_per_s", rate, "shards/s", "higher", f"wanted >= 5000, {shards:,} shards"),
        Figure("plan_memory_mb", memory, "MB", "lower", "wanted <= 500"),
        Figure("resume_scan_s", scan, "s", "lower", "wanted <= 10"),
    ]
    publish(figures, args.json)


if __name__ == "__main__":
    main()
