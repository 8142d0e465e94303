"""Least squares: exact on linear problems, honest about what fails, and quick on trajectories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from orchestrator import config, run
from orchestrator.adapters.optuna_samplers import LeastSquaresSampler, least_squares
from orchestrator.adapters.optuna_samplers.history import History, Point
from orchestrator.adapters.optuna_samplers.points import key_of
from orchestrator.adapters.optuna_search.least_squares import Deviations
from orchestrator.registries import searches
from orchestrator.space import Space

Params = Mapping[str, Any]

PLANE = {f"x{i}": {"low": -1.0, "high": 1.0} for i in range(6)}
SLOPES = np.random.default_rng(0).standard_normal((300, 4, 6))
TARGET = np.array([0.1, -0.4, 0.5, 0.0, 0.3, -0.2])


def bent(params: Params, start: int = 0, stop: int = 300, bend: float = 0.0) -> np.ndarray:
    """What 300 rows of 4 elements are off, by a linear law that may be bent; none at TARGET."""
    x = np.array([params[name] for name in PLANE]) - TARGET
    return SLOPES[start:stop] @ (x + bend * (x**2 + np.roll(x, 1) ** 2))


def squares(space: Space, bend: float, wrong: Callable[[Params], bool] = lambda _: False) -> Any:
    """A sampler and the loss that its rows have."""

    def loss(params: Params) -> float:
        return math.inf if wrong(params) else float(np.sqrt(np.mean(bent(params, bend=bend) ** 2)))

    return LeastSquaresSampler(space, 0, deviations=partial(bent, bend=bend), rows=300, tries=1), loss


def drive(space: Space, sampler: Any, trials: int, loss: Callable[[Params], float]) -> list[Params]:
    """The points that a sampler proposes, each told."""
    points: list[Point] = []
    losses: dict[str, float] = {}
    tried: list[Params] = []
    for i in range(trials):
        params = sampler.propose(History(tuple(points), losses, i))
        losses[key_of(space, params)] = value = loss(params)
        if math.isfinite(value):
            points.append(Point(params, value, i))
        tried.append(params)
    return tried


def test_one_step_solves_a_linear_problem_and_a_few_a_bent_one() -> None:
    space = Space(PLANE)
    sampler, loss = squares(space, 0.0)
    sampler = replace(sampler, damping=1e-12, reach=1.0)
    tried = drive(space, sampler, 8, loss)  # the start, six probes, the step
    assert loss(tried[0]) > 0.5 and loss(tried[-1]) < 1e-6 * loss(tried[0])
    assert np.allclose([tried[-1][name] for name in PLANE], TARGET, atol=1e-6)
    sampler, loss = squares(space, 0.3)
    tried = drive(space, sampler, 40, loss)
    assert min(map(loss, tried)) < 1e-3 * loss(tried[0])


def test_the_rows_are_read_in_as_many_pieces_as_memory_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for held in (2**24, 6 * 4 * 70 + 1):  # six probes, four elements a row: 300 rows, or 70
        monkeypatch.setattr(least_squares, "HELD", held)
        space = Space(PLANE)
        sampler, loss = squares(space, 0.3)
        pieces = []

        def counted(params: Params, start: int, stop: int, pieces: list[int] = pieces) -> np.ndarray:
            pieces.append(stop - start)
            return bent(params, start, stop, 0.3)

        tried = drive(space, replace(sampler, deviations=counted), 12, loss)
        found.append((max(pieces), [[params[name] for name in PLANE] for params in tried]))
    assert found[0][0] == 300 and found[1][0] == 70
    assert np.allclose(found[0][1], found[1][1], atol=1e-9)


def test_a_probe_that_failed_leaves_its_axis_alone_and_the_others_go_on() -> None:
    space = Space(PLANE)
    sampler, loss = squares(space, 0.0, lambda params: params["x2"] not in (0.0,))
    tried = drive(space, replace(sampler, damping=1e-9, reach=1.0), 8, loss)
    assert tried[-1]["x2"] == 0.0 and loss(tried[-1]) < 0.75 * loss(tried[0])


def test_a_step_that_is_worse_is_damped_until_one_is_better_or_the_descent_ends() -> None:
    space = Space(PLANE)
    sampler = replace(squares(space, 0.0)[0], reach=1.0)
    values = iter([1.0] + 6 * [1.1] + 5 * [2.0])  # the rows say one thing, the losses another
    found = drive(space, sampler, 12, lambda _: next(values))
    moved = [np.linalg.norm([p[name] - found[0][name] for name in PLANE]) for p in found[7:]]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.5 * moved[0]


def test_a_point_whose_rows_are_not_all_there_ends_its_descent_and_the_next_start_follows() -> None:
    space = Space(PLANE)

    def gone(params: Params, start: int, stop: int) -> np.ndarray:
        raise KeyError("rows from 0 are not in the store")

    sampler = LeastSquaresSampler(space, 0, deviations=gone, rows=300, tries=2)
    tried = drive(space, sampler, 9, squares(space, 0.0)[1])
    assert len({key_of(space, params) for params in tried}) == 9  # start, six probes, then points that nobody tried


def test_choices_are_those_of_the_start_and_spaced_numbers_are_moved_by_a_space() -> None:
    data = {"c": ["a", "b"], "x": {"low": 0.0, "high": 1.0}, "n": {"low": 1, "high": 9}}
    space = Space(data)

    def off(params: Params, start: int, stop: int) -> np.ndarray:
        return np.full((stop - start, 1), params["x"] + 0.1)

    sampler = LeastSquaresSampler(space, 0, deviations=off, rows=10, tries=1)
    start = Point({"c": "b", "x": 0.5, "n": 5}, 1.0, 0, is_baseline=True)
    search, tried = sampler._search(sampler._starts(History((start,), {}, 0))), []
    tried.append(next(search))
    for loss in (1.0, 0.9, 0.5):
        tried.append(search.send(loss))
    assert {p["c"] for p in tried} == {"b"} and {p["n"] for p in tried} == {5} and tried[2]["x"] < 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective": "quality/frechet"}, "its objective is quality/trajectory_error, got quality/frechet"),
        ({"objectives": ["quality/trajectory_error", "cost/nfe"]}, "nsga2 for several"),
        ({"probe": 0.0}, "search.probe must lie between"),
    ],
)
def test_least_squares_refuses_what_it_cannot_read(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        searches.build({"name": "least_squares", "space": PLANE} | more)


def test_least_squares_lowers_a_trajectory_error_and_reads_what_the_metric_measured(tmp_path: Path) -> None:
    """As a user runs it."""
    found = run(
        "model=gmm", "name=ls", "nfe=5", "search=least_squares", "space=trajectory", "search.num_trials=60",
        "search.baselines=[{solver: {name: unified, preset: unipc}}]", "search.held_out=0", "num_samples=64",
        "shard_size=64", "batch_size=64", "search.racing={start: 16}", "metrics=[{name: trajectory, num_steps: 32}]",
        "tracker=none",
        f"root={tmp_path}",
    )  # fmt: skip
    trials = found.trials().to_pylist()
    values = [trial["value/quality/trajectory_error"] for trial in trials]
    assert min(values) < 0.7 * values[0] and [trial["state"] for trial in trials] == ["complete"] * 61
    assert {trial["num_samples"] for trial in trials} == {64}  # a baseline without a rival, and proposals do not race

    study = config.study(found.config)
    space = Space(study.search["space"], study.recipe)
    read = Deviations(space, {}, study.context(), 0)
    tried = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'optuna.db'}").trials[-1]
    off = np.concatenate([read(tried.params, 0, 40), read(tried.params, 40, 64)])
    assert off.shape == (64, 2) and np.sqrt(np.mean(off.astype(np.float64) ** 2)) == pytest.approx(
        tried.value, rel=1e-6
    )
    with pytest.raises(KeyError):
        read(tried.params, 0, 65)
