"""Particles in a study: the same numbers for other numbers of workers, other shards, and after a launch that grew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.store import Store
from orchestrator.study import Study
from tasks.recipe import Recipe


class Threads:
    """Three tasks at a time, in threads."""

    slots = 3

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.slots)

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        return self.pool.submit(function, task)


@pytest.fixture
def threads() -> Iterator[Threads]:
    """An executor that really has several tasks in flight."""
    executor = Threads()
    yield executor
    executor.pool.shutdown()


def columns(study: Study) -> dict[str, np.ndarray]:
    """Every column of the rows but the time that they took, in order of their indices."""
    tables = list(Store(study.root).read("rows", study.recipe.key, 0, study.num_samples))
    names = set(tables[0].column_names) - {"seconds"}
    return {n: np.concatenate([np.array(table[n].to_pylist()) for table in tables]) for n in names}


STRATEGIES = [
    {"name": "fk_steering", "particles": 3, "first": 1, "every": 1, "trigger": "ess"},
    {"name": "das", "particles": 3},
    {"name": "svdd", "children": 3},
    {"name": "minority", "n": 3, "interval": 1},
    {"name": "beam", "width": 2, "children": 2},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s["name"])
def test_samples_weights_and_costs_do_not_depend_on_workers_shards_or_launches(
    make_study: Callable, launch: Callable, tmp_path: Path, threads: Threads, strategy: dict[str, Any]
) -> None:
    solver, times = {"name": "ddim", "eta": 1.0}, {"name": "uniform", "num_steps": 4}
    recipe = Recipe("gmm", solver, times, "none", strategy, "quadratic", batch_size=9).completed()  # type: ignore[arg-type]
    here = make_study(recipe=recipe, num_samples=30, shard_size=30, root=str(tmp_path / "here"))
    one = launch(here)
    for count, size in ((13, 5), (30, 7)):  # the second launch goes on from the first
        there = make_study(recipe=recipe, num_samples=count, shard_size=size, root=str(tmp_path / "there"))
        many = launch(there, threads)
    assert many.trials[0].state == "complete", many.trials[0].reason
    wanted, found = columns(here), columns(there)
    assert wanted.keys() == found.keys() and {"nfe", "reward_calls"} <= wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert many.trials[0].values == one.trials[0].values
