"""Pools by stage, workers by room, and tasks that kill whoever runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import config
from orchestrator.chaos import Tally, compare
from orchestrator.ports import WorkerLost
from orchestrator.registries import executors

pytestmark = pytest.mark.ray


@pytest.fixture
def ray_address() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


def test_separate_pools_give_the_same_rows_and_values(
    solvus: Callable[..., SimpleNamespace], tmp_path: Path, ray_address: None
) -> None:
    common = ["study=tiny", "num_samples=96", "batch_size=32", "shard_size=32", "search.space={nfe:[4,6]}"]
    common += ["metrics=[{name:frechet,features:identity}]", "tracker=none"]
    pools = "executor.pools={decode:{workers:1,cpus:0.5},write:{workers:1,cpus:0.5},score:{workers:1,cpus:0.5}}"
    assert solvus("run", *common, f"root={tmp_path / 'here'}").code == 0
    far = solvus("run", *common, f"root={tmp_path / 'far'}", "executor=ray", "executor.workers=1", pools)
    assert far.code == 0, far.err
    tally = Tally("pools")
    compare(tally, tmp_path / "here", tmp_path / "far", "tiny")
    assert (tally.lost, tally.duplicated, tally.different) == (0, 0, 0), tally.notes


def test_a_task_that_kills_its_worker_is_given_up_and_the_others_are_not(ray_address: None) -> None:
    def die(task: int) -> None:  # local, so that they travel by value
        os._exit(task)

    def double(task: int) -> int:
        return 2 * task

    pool = executors.build({"name": "ray", "workers": 1, "max_losses": 2}).start()
    try:
        poison = pool.submit(die, 3)
        others = [pool.submit(double, i) for i in range(4)]
        with pytest.raises(WorkerLost, match="died 2 times"):
            poison.result(120)
        done = [_outcome(future) for future in others]
        assert all(value in (0, 2, 4, 6, "lost") for value in done) and done[-1] == 6
    finally:
        pool.close()


def _outcome(future: Any) -> Any:
    try:
        return future.result(120)
    except WorkerLost:  # it was in flight beside the poison each time
        return "lost"


@pytest.mark.parametrize("name", ["local", "ray", "gpu", "cpu"])
def test_every_cluster_preset_composes_to_an_executor(name: str, tmp_path: Path) -> None:
    data = config.compose(["study=tiny", f"cluster={name}", f"root={tmp_path}"])
    executor = executors.build(data["executor"])
    assert executor.name == ("local" if name == "local" else "ray")
    if name == "gpu":
        assert data["device"] == "cuda" and executor.pools["score"]["gpus"] == 0.5 and executor.workers == 0


def test_a_cluster_preset_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="unknown cluster 'gpus', did you mean 'gpu'"):
        config.compose(["cluster=gpus"])


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"generate": {"workers": 2}}, "decode, write and score"),
        ({"score": {"worker": 2}}, "takes"),
        ({"write": {"workers": 0}}, "workers >= 1"),
    ],
)
def test_pools_that_mean_nothing_are_refused(pools: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        executors.build({"name": "ray", "pools": pools})
