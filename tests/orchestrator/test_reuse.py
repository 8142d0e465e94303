"""Kept states in a study: the same tables for fewer evaluations, in a cache that stays small and is never trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.states import StateCache


def refinement(make_study: Callable, gmm: Any, reuse_gib: float, root: Path) -> Any:
    """Five trials that differ in their last steps."""
    solver = {"name": "unified", "preset": "dpmpp_2m"}
    recipe = gmm.override({"solver": solver, "times": {"name": "explicit", "values": [1.0, 0.7, 0.5, 0.3, 0.0]}})
    values = [[1.0, 0.7, 0.5, t, 0.0] for t in (0.3, 0.25, 0.2, 0.15)] + [[1.0, 0.7, 0.45, 0.3, 0.0]]
    return make_study(
        recipe=recipe, search={"name": "grid", "space": {"times.values": values}}, reuse_gib=reuse_gib, root=str(root)
    )


def test_a_study_of_later_changes_spends_less_and_says_the_same(
    make_study: Callable, launch: Callable, gmm: Any, tmp_path: Path
) -> None:
    plain = launch(refinement(make_study, gmm, 0.0, tmp_path / "plain"))
    shared = launch(refinement(make_study, gmm, 0.1, tmp_path / "shared"))
    assert [t.values for t in shared.trials] == [t.values for t in plain.trials]
    assert shared.ledger.spent["nfe_reused"] == 32 * (2 + 2 + 2 + 1)
    assert shared.ledger.spent["nfe"] + shared.ledger.spent["nfe_reused"] == plain.ledger.spent["nfe"]
    assert [t.cost["nfe_reused"] for t in shared.trials] == [0, 64, 64, 64, 32]
    for trial in plain.trials:
        a, b = (
            [table.to_pydict()["x0"] for table in done.store.read("rows", trial.recipe.key, 0, 32)]
            for done in (plain, shared)
        )
        assert a == b


def arrays(size: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros(size, dtype=np.uint8)}


def test_a_cache_stays_under_its_bound_and_drops_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = StateCache(str(tmp_path), 40_000)
    for i in range(3):
        cache.save(f"a{i}", 0, arrays(10_000))
    import os

    for i, age in enumerate((300, 200, 100)):
        path = cache._path(f"a{i}", 0)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert cache.load("a0", 0) is not None  # used just now
    for i in range(3, 5):
        cache.save(f"a{i}", 0, arrays(10_000))
        assert cache.size() <= 40_000
    assert cache.load("a1", 0) is None and cache.load("a0", 0) is not None
    cache.save("large", 0, arrays(50_000))
    assert cache.load("large", 0) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_state_is_not_there(tmp_path: Path, damage: str) -> None:
    cache = StateCache(str(tmp_path), 10**6)
    cache.save("key", 256, arrays(1000))
    path = cache._path("key", 256)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[500] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:400]), "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    assert cache.load("key", 256) is None
    cache.save("key", 256, arrays(1000))
    assert cache.load("key", 256) is not None


def test_garbage_collection_drops_states_when_told_to(
    make_study: Callable, launch: Callable, gmm: Any, solvus: Callable, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    launch(refinement(make_study, gmm, 0.1, root))
    assert StateCache(str(root), 1).size() > 0
    solvus("gc", f"root={root}")
    assert StateCache(str(root), 1).size() > 0
    assert solvus("gc", "--states", f"root={root}", "--json").data["files"] > 0
    assert StateCache(str(root), 1).size() == 0
    assert solvus("verify", f"root={root}").code == 0


@pytest.mark.parametrize(("value", "message"), [("-1", "at least 0, got -1"), ("much", "at least 0, got 'much'")])
def test_a_bound_that_makes_no_sense_is_refused(solvus: Callable, value: str, message: str, tmp_path: Path) -> None:
    found = solvus("plan", "study=tiny", f"reuse_gib={value}", f"root={tmp_path}")
    assert found.code == 2 and message in found.err


@pytest.mark.ray
def test_two_workers_share_states_and_make_the_same_rows(
    make_study: Callable, launch: Callable, gmm: Any, tmp_path: Path
) -> None:
    from orchestrator.adapters.ray_executor import RayExecutor

    here = launch(refinement(make_study, gmm, 0.1, tmp_path / "here"))
    executor = RayExecutor(workers=2, address="local").start()
    try:
        there = launch(refinement(make_study, gmm, 0.1, tmp_path / "there"), executor)
    finally:
        executor.close()
    assert [t.values for t in there.trials] == [t.values for t in here.trials]
    assert replace(there.trials[0].recipe) == here.trials[0].recipe
