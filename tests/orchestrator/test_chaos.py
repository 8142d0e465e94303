"""Faults on purpose: ``solvus chaos`` in short, damaged bytes by the thousand, and rows that kill workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator import chaos
from orchestrator.ports import WorkerLost
from orchestrator.store import CorruptShard, Store
from orchestrator.study import Study


def run_chaos(*arguments: str, timeout_s: float) -> SimpleNamespace:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "chaos", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.stdout, done.stderr
    figures = {figure["name"]: figure["value"] for figure in json.loads(done.stdout)["figures"]}
    return SimpleNamespace(code=done.returncode, err=done.stderr, **figures)


def test_nothing_is_lost_doubled_or_changed_by_faults_in_the_driver_and_its_files() -> None:
    found = run_chaos("--faults", "50", "--ray-kills", "0", "--seed", "1", timeout_s=300)
    assert (found.code, found.lost, found.duplicated, found.different) == (0, 0, 0, 0), found.err
    assert found.faults >= 45


@pytest.mark.ray
def test_nothing_is_lost_when_workers_nodes_driver_and_head_of_a_ray_cluster_are_killed() -> None:
    found = run_chaos("--faults", "1", "--ray-kills", "5", "--seed", "2", timeout_s=400)
    assert (found.code, found.lost, found.duplicated, found.different) == (0, 0, 0, 0), found.err
    assert found.wasted_shards_per_kill <= 2


@pytest.mark.chaos
def test_the_whole_chaos_suite() -> None:
    found = run_chaos(timeout_s=3600)
    assert (found.code, found.lost, found.duplicated, found.different) == (0, 0, 0, 0), found.err
    assert found.faults >= 200 and found.wasted_shards_per_kill <= 1


def test_a_thousand_damaged_files_are_all_found_and_none_is_read_as_data(tmp_path: Path) -> None:
    store, draw = Store(tmp_path), random.Random(0)
    tables = {}
    for i in range(600):
        table = pa.table({"sample_id": np.arange(i * 4, i * 4 + 4), "x0": np.random.default_rng(i).normal(size=4)})
        key = f"{i % 7:02d}" + "c" * 30
        tables[key, i] = table
        store.put("rows", key, i * 4, i * 4 + 4, table, {"nfe": 3}, {"commit": "x"})
    files = sorted((tmp_path / "store" / "rows").glob("*/*/*"))
    assert len(files) == 1200
    hurt = draw.sample(files, 1000)
    for path, other in zip(hurt, reversed(hurt), strict=True):
        kind = draw.choice(["truncate", "flip", "empty", "exchange"])
        if kind == "exchange" and other.read_bytes() != path.read_bytes():
            path.write_bytes(other.read_bytes())
        else:
            chaos.damage(path, "flip" if kind == "exchange" else kind, draw)
    _, wrong = store.verify()
    damaged = {(path.parent.name, path.name.split(".")[0]) for path in hurt}
    seen = {(line.split("/")[2], line.split("/")[3].split(".")[0].split(":")[0]) for line in wrong}
    assert damaged == seen
    readable = 0
    for (key, i), table in tables.items():
        try:
            found = pa.concat_tables(store.read("rows", key, i * 4, i * 4 + 4))
        except (KeyError, CorruptShard):
            assert (key, f"{i * 4:010d}-{i * 4 + 4:010d}") in damaged
            continue
        assert found.equals(table)
        readable += 1
    assert readable == 600 - len(damaged)
    store.verify(withdraw=True)
    assert store.verify()[1] == []


class PoisonedExecutor:
    """Runs tasks here, but the worker dies whenever one row is among those that are made."""

    slots = 2

    def __init__(self, row: int) -> None:
        self.row, self.deaths = row, 0

    def load(self) -> Any:
        from orchestrator.ports import Load

        return Load()

    def submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        from concurrent.futures import Future

        future: Future = Future()
        if task.rows and task.start <= self.row < task.stop:
            self.deaths += 1
            future.set_exception(WorkerLost("its worker died 3 times"))
        else:
            future.set_result(function(task))
        return future

    def close(self) -> None:
        """Nothing to end."""


def test_one_poison_row_is_found_set_aside_and_reported_and_every_other_row_is_made(
    make_study: Callable[..., Study], launch: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    study = make_study(num_samples=64, shard_size=32)
    executor = PoisonedExecutor(41)
    done = launch(study, executor)
    (trial,) = done.trials
    assert (trial.state, list(trial.quarantined)) == ("degraded", [41])
    assert "died" in trial.quarantined[41]
    assert executor.deaths == 6  # 32, 16, 8, 4, 2 and 1 rows: bounded by the logarithm of the shard
    whole = launch(make_study(num_samples=64, shard_size=32, root=str(tmp_path / "whole")))
    good = np.concatenate([t["x0"].to_pylist() for t in whole.store.read("rows", trial.recipe.key, 0, 64)])
    for low, high in ((0, 41), (42, 64)):
        mine = np.concatenate([t["x0"].to_pylist() for t in done.store.read("rows", trial.recipe.key, low, high)])
        assert np.array_equal(mine, good[low:high])
    # It is never tried again, and releasing it is a decision.
    again = launch(study, executor)
    assert executor.deaths == 6 and again.trials[0].state == "degraded"
    assert done.store.collect_garbage(0, dry_run=False, release=True)["released"] == 1
    assert launch(study).trials[0].state == "complete"


def test_a_degraded_study_exits_with_status_three_and_status_names_the_row(
    solvus: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from orchestrator.executors.local import LocalExecutor

    poisoned = PoisonedExecutor(5)
    monkeypatch.setattr(LocalExecutor, "start", lambda self, *study: poisoned)
    argv = [
        "model=gmm",
        "name=hurt",
        "num_samples=16",
        "batch_size=8",
        "shard_size=8",
        "tracker=none",
        f"root={tmp_path}",
    ]
    assert solvus("run", *argv).code == 3
    told = solvus("status", "name=hurt", f"root={tmp_path}")
    assert "degraded" in told.out and "/5: its worker died" in told.out


def test_sigterm_keeps_what_is_finished(tmp_path: Path) -> None:
    argv = chaos.arguments(tmp_path, 400, 32)
    process = subprocess.Popen(
        [*chaos.SOLVUS, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    chaos.wait_for_rows(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "continue with" in err, err
    store = Store(tmp_path)
    assert store.verify()[1] == []
    assert len(list(tmp_path.glob("store/rows/*/*/*.json"))) >= 3
