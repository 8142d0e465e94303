"""Faults on purpose: what ``solvus chaos`` and the tests inject, and how they tell that nothing was lost.

Every scenario runs a small exact study, hurts it, continues it with the same command, and compares its rows and its
trial table with those of an undisturbed run, bit for bit. The suite ends only processes that it started.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import rows
from orchestrator.results import Results
from orchestrator.store import Store

SOLVUS = [sys.executable, "-m", "orchestrator.cli"]
NAME = "chaos"


@dataclass
class Tally:
    """What a scenario did and what it found."""

    name: str
    faults: int = 0
    killed_workers: int = 0  # processes killed while they could be generating
    recomputed: int = 0
    wasted_s: float = 0.0
    lost: int = 0
    duplicated: int = 0
    different: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def arguments(root: Path, shards: int, rows_each: int, *more: str) -> list[str]:
    """The command line of the study: one solver at two costs, so that several trials are in flight."""
    count = shards * rows_each // 2
    return [
        "run",
        "study=tiny",
        f"name={NAME}",
        "search.space={nfe:[4,6]}",
        f"num_samples={count}",
        f"shard_size={rows_each}",
        "batch_size=32",
        "metrics=[{name:frechet,features:identity}]",
        "tracker=none",
        f"root={root}",
        *more,
    ]


def run_here(argv: list[str]) -> int:
    """Run the command line in this process, quietly."""
    from orchestrator import cli

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return cli.main(argv)


def in_child(function: Callable[[], Any], timeout_s: float = 300.0) -> int:
    """Run a function in a forked child; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                code = int(function() or 0)
        finally:
            os._exit(code)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a chaos child did not end within {timeout_s} s")


def compare(tally: Tally, reference: Path, root: Path, name: str = NAME) -> None:
    """Count rows lost, duplicated and different from the undisturbed run, and differing trials."""
    wanted = {_identity(row): row for row in Results(str(reference), name).trials()}
    found = [_identity(row) for row in Results(str(root), name).trials()]
    tally.duplicated += sum(count - 1 for count in Counter(found).values())
    table = {_identity(row): row for row in Results(str(root), name).trials()}
    good, other = Store(str(reference)), Store(str(root))
    for identity, row in wanted.items():
        key, first, count = row["key"], row["first_index"], row["num_samples"]
        if identity not in table:
            tally.lost += count
            tally.notes.append(f"trial {identity} is missing")
            continue
        expected = _rows(good, key, first, count)
        try:
            actual = _rows(other, key, first, count)
        except KeyError as error:
            tally.lost += count
            tally.notes.append(str(error))
            continue
        ids = actual["sample_id"]
        tally.duplicated += len(ids) - len(np.unique(ids))
        tally.different += int((expected["x0"] != actual["x0"]).any(axis=1).sum())
        mine, theirs = _values(row), _values(table[identity])
        if mine != theirs:
            tally.different += 1
            tally.notes.append(f"trial {identity}: {mine} became {theirs}")


def count_waste(tally: Tally, root: Path, trace: Path, needed: int) -> None:
    """Generations that began beyond those that were needed, and what they took, at the mean of the committed ones."""
    started = len(trace.read_text().splitlines()) if trace.exists() else 0
    tally.recomputed = max(started - needed, 0)
    store = Store(root)
    keys = [(kind, key) for kind in store.files.folders("rows") for key in store.files.folders(f"rows/{kind}")]
    spent = [record.ledger.get("generate_s", 0.0) for _, key in keys for record in store.committed("rows", key)]
    tally.wasted_s = tally.recomputed * float(np.mean(spent)) if spent else 0.0


def _identity(row: dict[str, Any]) -> str:
    return f"{row['part']}/{row['key']}/{row['first_index']}+{row['num_samples']}"


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k.startswith(("value/", "se/")) or k in ("state", "overrides")}


def _rows(store: Store, key: str, first: int, count: int) -> dict[str, np.ndarray]:
    tables = list(store.read("rows", key, first, first + count, ["sample_id", "x0"]))
    return {name: np.concatenate([rows.to_numpy(table[name]) for table in tables]) for name in ("sample_id", "x0")}


# --- in this process: kills at chosen and at random places ------------------------------------------------------------


def kill_at_commit(point: str, after: int) -> None:
    """Arrange for SIGKILL at the n-th commit: before the data, between data and record, or just after the record."""
    from orchestrator.files import LocalFiles

    seen = {"write": 0, "record": 0}
    write, put = LocalFiles.write, LocalFiles.put_if_absent

    def hurt_write(self: LocalFiles, name: str, data: bytes) -> None:
        if name.endswith(".parquet") and not name.startswith("trials"):
            seen["write"] += 1
            if point == "before-data" and seen["write"] == after:
                os.kill(os.getpid(), signal.SIGKILL)
            if point == "half-data" and seen["write"] == after:
                target = self._path(name).with_name(".tmp-half")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        write(self, name, data)

    def hurt_put(self: LocalFiles, name: str, data: bytes) -> bool:
        record = name.startswith(("rows/", "columns/"))
        seen["record"] += record
        if record and point == "before-record" and seen["record"] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        made = put(self, name, data)
        if record and point == "after-record" and seen["record"] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    LocalFiles.write, LocalFiles.put_if_absent = hurt_write, hurt_put  # type: ignore[method-assign]


def kill_at_line(after: int) -> None:
    """Arrange for SIGKILL at the n-th line that the driver executes."""
    left = after
    package = str(Path(__file__).parent)

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def driver_kills(reference: Path, root: Path, faults: int, shards: int, seed: int) -> Tally:
    """Kill the in-process driver at commits and at random lines, again and again, then let it finish."""
    tally, draw, began = Tally("driver killed at commits and at random lines"), random.Random(seed), time.monotonic()
    points = ("before-data", "half-data", "before-record", "after-record", "line")
    trace = root / "trace"
    root.mkdir(parents=True, exist_ok=True)
    os.environ["SOLVUS_TRACE"] = str(trace)
    argv = arguments(root, shards, 32)
    lines, needed = 400, shards
    try:
        while tally.faults < faults:
            point = draw.choice(points)

            def hurt(point: str = point, after: int = draw.randint(1, 3), line: int = draw.randint(1, lines)) -> int:
                kill_at_line(line) if point == "line" else kill_at_commit(point, after)
                return run_here(argv)

            if in_child(hurt) == -signal.SIGKILL:
                tally.faults += 1
                tally.killed_workers += 1
                lines = min(lines * 2, 60_000) if point == "line" else lines
            else:  # it came to its end alive: take some rows away, so that there is something left to do
                needed += forget_some(root, draw)
                lines = 400
        if in_child(lambda: run_here(argv)) != 0:
            tally.notes.append("the last run did not end well")
    finally:
        del os.environ["SOLVUS_TRACE"]
    count_waste(tally, root, trace, needed)
    compare(tally, reference, root)
    tally.seconds = time.monotonic() - began
    return tally


def forget_some(root: Path, draw: random.Random) -> int:
    """Remove a third of the commit records; how many of them were of rows."""
    forgotten = 0
    for record in sorted((root / "store").glob("*/*/*/*.json")):
        if record.parts[-4] in ("rows", "columns") and draw.random() < 0.34:
            record.unlink()
            forgotten += record.parts[-4] == "rows"
    return forgotten


def two_drivers(reference: Path, root: Path, rounds: int, shards: int) -> Tally:
    """Two drivers run the same study at the same time, one of them is killed in mid-run, the other goes on."""
    tally, began = Tally("two drivers at once"), time.monotonic()
    for i in range(rounds):
        place = root / f"round{i}"
        argv = [*SOLVUS, *arguments(place, shards, 32)]
        pair = [subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
        if i % 2:
            wait_for_rows(place, 2)
            pair[0].kill()
            tally.faults += 1
        codes = [process.wait(300) for process in pair]
        tally.faults += 1
        if codes[1] != 0:
            tally.notes.append(f"exit status {codes}")
            tally.lost += 1
        compare(tally, reference, place)
    tally.seconds = time.monotonic() - began
    return tally


def wait_for_rows(root: Path, count: int, timeout_s: float = 120.0) -> None:
    """Until a run has committed that many ranges of rows."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and len(list(root.glob("store/rows/*/*/*.json"))) < count:
        time.sleep(0.05)


# --- bytes -----------------------------------------------------------------------------------------------------------

DAMAGES = ("truncate", "flip", "empty", "swap", "half-json", "stray")


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Hurt one file of a store."""
    data = path.read_bytes()
    if not data:  # hurt before, and an orphan by now
        path.write_bytes(b"garbage")
    elif kind == "truncate":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == "flip":
        at = draw.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half-json":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "swap":
        path.write_bytes(bytes(reversed(data)))


def bad_bytes(reference: Path, root: Path, faults: int, shards: int, seed: int) -> Tally:
    """Damage files of a finished store, run again: made anew or ignored, never trusted."""
    tally, draw, began = Tally("truncated, flipped, emptied, swapped files"), random.Random(seed), time.monotonic()
    argv = arguments(root, shards, 32)
    run_here(argv)
    while tally.faults < faults:
        files = sorted(p for p in (root / "store").glob("*/*/*/*") if p.parts[-4] in ("rows", "columns"))
        for path in draw.sample(files, min(10, len(files), faults - tally.faults)):
            kind = draw.choice(DAMAGES)
            if kind == "stray":
                path.with_name(f"{draw.getrandbits(32):08x}.parquet").write_bytes(b"stray")
            else:
                damage(path, kind, draw)
            tally.faults += 1
        for value in (root / "store" / "values").glob("*/*.json"):  # so that the rows are read again
            value.unlink()
        if run_here(argv) != 0:
            tally.notes.append("a run over a damaged store did not end well")
    compare(tally, reference, root)
    tally.seconds = time.monotonic() - began
    return tally


def suite(folder: Path, faults: int, ray_kills: int, seed: int, say: Callable[[str], None]) -> list[Tally]:
    """Every scenario, each against its own undisturbed run."""
    from orchestrator import chaos_cluster

    reference, shards = folder / "reference", 24
    if run_here(arguments(reference, shards, 32)) != 0:
        raise ValueError("the undisturbed run failed; chaos can say nothing")
    plans: list[Callable[[], Tally]] = [
        lambda: driver_kills(reference, folder / "driver", max(faults * 5 // 10, 5), shards, seed),
        lambda: bad_bytes(reference, folder / "bytes", max(faults * 4 // 10, 6), shards, seed),
        lambda: two_drivers(reference, folder / "two", max(faults // 40, 1), shards),
    ]
    if ray_kills:
        large = folder / "large"
        many, each = (500, 512) if ray_kills >= 100 else (60, 256)
        if run_here(arguments(large, many, each)) != 0:
            raise ValueError("the undisturbed run failed; chaos can say nothing")
        plans.append(lambda: chaos_cluster.cluster_kills(large, folder / "ray", ray_kills, many, each, seed))
        if ray_kills >= 100:
            plans.append(lambda: chaos_cluster.link_cuts(large, folder / "link", many, each))
    tallies = []
    for plan in plans:
        tally = plan()
        tallies.append(tally)
        say(json.dumps(vars(tally)))
    return tallies


def table(tallies: list[Tally]) -> str:
    """One line a scenario, and the sum."""
    head = f"{'scenario':<48}{'faults':>8}{'again':>8}{'wasted s':>10}{'lost':>6}{'twice':>7}{'other':>7}{'s':>8}"
    lines = [head]
    for t in [*tallies, total(tallies)]:
        lines.append(
            f"{t.name:<48}{t.faults:>8}{t.recomputed:>8}{t.wasted_s:>10.1f}{t.lost:>6}{t.duplicated:>7}"
            f"{t.different:>7}{t.seconds:>8.0f}"
        )
        lines += [f"  {note}" for note in t.notes] if t in tallies else []
    return "\n".join(lines)


def total(tallies: list[Tally]) -> Tally:
    """The sum of all scenarios."""
    together = Tally("in all")
    for tally in tallies:
        for name in (
            "faults",
            "killed_workers",
            "recomputed",
            "wasted_s",
            "lost",
            "duplicated",
            "different",
            "seconds",
        ):
            setattr(together, name, getattr(together, name) + getattr(tally, name))
    return together
