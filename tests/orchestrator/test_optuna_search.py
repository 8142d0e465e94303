"""Optuna's samplers behind ask and tell: better than random, resumed exactly, never fooled by NaN."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest

from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches

LOSS = "quality/frechet"
SPACE = {"a": {"low": -5.0, "high": 5.0}, "b": {"low": 1, "high": 30}, "c": {"low": 1e-4, "high": 1.0, "log": True}}


def context(root: Path, seed: int = 0, key: str = "key") -> SearchContext:
    return SearchContext("study", key, seed, str(root), better={LOSS: "lower", "reward/ink": "higher"})


def loss(overrides: Mapping[str, Any]) -> float:
    """Best at a = 2, b = 20, c = 0.01, where it is 0."""
    return (overrides["a"] - 2) ** 2 + (overrides["b"] - 20) ** 2 / 25 + math.log10(overrides["c"] / 0.01) ** 2


def drive(search: Any, value: Callable[[Mapping[str, Any]], float] = loss, limit: int = 10**6) -> list[dict[str, Any]]:
    """Ask and tell one at a time; the points asked for."""
    found: list[dict[str, Any]] = []
    while len(found) < limit and (proposal := search.ask()) is not None:
        found.append(dict(proposal.overrides))
        search.tell(proposal, {LOSS: value(proposal.overrides)})
    return found


def spec(name: str = "tpe", num_trials: int = 8, **fields: Any) -> dict[str, Any]:
    return {"name": name, "space": SPACE, "num_trials": num_trials, "held_out": 0} | fields


DESCRIBED = spec(num_startup_trials=3, baselines=[{"a": 0.0, "b": 5, "c": 0.1}])


def start(root: Path, spec: dict[str, Any], seed: int = 0) -> Any:
    return searches.build(spec).start(context(root, seed))


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Any], optuna.Study]:
    """A function that opens the Optuna study behind a search, as another program would."""
    return lambda search: optuna.load_study(study_name=search.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}")


def table(study: optuna.Study) -> list[tuple[int, str, dict[str, Any], float | None]]:
    return [(t.number, t.state.name, t.params, t.value if t.values else None) for t in study.trials]


# --- proposals -------------------------------------------------------------------------------------------------------


def test_tpe_ends_nearer_to_the_optimum_than_random_search(tmp_path: Path) -> None:
    def nearest(name: str, seed: int) -> float:
        root = tmp_path / f"{name}{seed}"
        root.mkdir()
        return min(map(loss, drive(start(root, spec(name, 30), seed))))

    best = {name: median(nearest(name, seed) for seed in range(5)) for name in ("tpe", "random")}
    assert best["tpe"] < 0.5 * best["random"]


def test_points_lie_in_the_space_with_their_types(tmp_path: Path) -> None:
    space = SPACE | {"d": {"low": 0, "high": 9, "step": 3}, "e": {"low": 0.0, "high": 1.0, "step": 0.25}, "f": ["x", 1]}
    points = drive(start(tmp_path, spec("random", 12, space=space)))
    assert len(points) == 12
    for point in points:
        assert list(point) == list(space)
        assert isinstance(point["a"], float) and -5 <= point["a"] <= 5
        assert isinstance(point["b"], int) and 1 <= point["b"] <= 30
        assert 1e-4 <= point["c"] <= 1
        assert point["d"] in (0, 3, 6, 9) and point["e"] in (0, 0.25, 0.5, 0.75, 1) and point["f"] in ("x", 1)
    assert len({point["a"] for point in points}) == 12


def test_baselines_come_first_and_shared_overrides_always(tmp_path: Path) -> None:
    baselines = [{"a": 0.0, "b": 5, "c": 0.1}, {"a": 1.0, "b": 6, "c": 0.2}]
    points = drive(start(tmp_path, spec(num_trials=4, baselines=baselines, set={"solver": "heun"})))
    assert points[:2] == [{"solver": "heun"} | point for point in baselines]
    assert len(points) == 2 + 4 and all(point["solver"] == "heun" for point in points)


def test_choices_may_be_whole_specs(tmp_path: Path) -> None:
    choices = ["euler", {"name": "ddim", "eta": 1.0}, {"name": "ddim", "eta": 0.0}, None]
    search = start(tmp_path, spec("random", 20, space={"solver": choices}, baselines=[{"solver": choices[1]}]))
    points = drive(search, lambda o: 0.0)
    assert points[0]["solver"] == choices[1]
    assert all(point["solver"] in choices for point in points)
    assert all(any(point["solver"] == choice for point in points) for choice in choices)


def test_the_direction_is_the_metrics_own(tmp_path: Path, stored: Callable) -> None:
    for objective, direction in ((LOSS, "MINIMIZE"), ("reward/ink", "MAXIMIZE")):
        search = start(tmp_path, spec(objective=objective, num_trials=1))
        proposal = search.ask()
        search.tell(proposal, {objective: 1.0})
        assert stored(search).direction.name == direction


def test_another_space_sampler_or_recipe_is_another_search(tmp_path: Path) -> None:
    first = start(tmp_path, spec())
    others = [start(tmp_path, spec(space={"a": [1, 2]})), start(tmp_path, spec("random"))]
    others.append(searches.build(spec()).start(context(tmp_path, key="other")))
    assert len({search.name for search in (first, *others)}) == 4
    assert start(tmp_path, spec()).name == first.name


def test_seeds_give_other_points_and_the_same_seed_the_same(tmp_path: Path) -> None:
    points = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        points.append(drive(start(tmp_path / name, spec("random", 3), seed)))
    assert points[0] == points[1] != points[2]


def test_preview_foresees_the_budget_and_the_baselines_without_touching_the_storage(tmp_path: Path) -> None:
    baseline = {"a": 0.0, "b": 5, "c": 0.1}
    previewed = list(start(tmp_path, spec(num_trials=3, baselines=[baseline], set={"seed": 1}, part="p")).preview())
    assert [(p.overrides.keys(), p.part) for p in previewed] == [({"seed", *SPACE}, "p")] * (1 + 3)
    assert previewed[0].overrides == {"seed": 1} | baseline
    assert list(tmp_path.iterdir()) == []


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], optuna.Study]:
    """Points and Optuna study of a search that nobody killed."""
    root = tmp_path_factory.mktemp("undisturbed")
    search = start(root, DESCRIBED)
    points = drive(search)
    return points, optuna.load_study(study_name=search.name, storage=f"sqlite:///{root / 'optuna.db'}")


@pytest.mark.parametrize("asked_but_not_told", [False, True])
def test_a_search_killed_in_mid_study_continues_as_if_undisturbed(
    tmp_path: Path, stored: Callable, undisturbed: tuple[list[dict[str, Any]], optuna.Study], asked_but_not_told: bool
) -> None:
    first = start(tmp_path, DESCRIBED)
    drive(first, limit=4)
    if asked_but_not_told:
        first.ask()
    del first  # the process is gone; what it asked for stays RUNNING
    resumed = start(tmp_path, DESCRIBED)
    assert drive(resumed) == undisturbed[0]
    found = table(stored(resumed))
    assert found == table(undisturbed[1])
    assert [state for _, state, _, _ in found] == ["COMPLETE"] * (1 + 8)
    assert len({tuple(params.items()) for _, _, params, _ in found}) == 1 + 8  # no random stream was replayed


def test_a_finished_search_proposes_its_trials_again_and_adds_none(tmp_path: Path, stored: Callable) -> None:
    points = drive(start(tmp_path, spec(num_trials=4)))
    again = start(tmp_path, spec(num_trials=4))
    assert drive(again) == points
    assert len(stored(again).trials) == 4


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_larger_budget_keeps_the_trials_that_are_there(tmp_path: Path, stored: Callable, kind: str) -> None:
    points = drive(start(tmp_path, spec(kind, 3)))
    grown = start(tmp_path, spec(kind, 5))
    assert drive(grown)[:3] == points
    assert len(stored(grown).trials) == 5


def test_several_asked_trials_left_behind_are_all_finished(tmp_path: Path, stored: Callable) -> None:
    first = start(tmp_path, spec(num_trials=4, parallel=3))
    left = [dict(first.ask().overrides) for _ in range(3)]
    assert first.ask() is None  # as many as it may
    del first
    resumed = start(tmp_path, spec(num_trials=4))
    assert drive(resumed)[:3] == left
    assert [t.state.name for t in stored(resumed).trials] == ["COMPLETE"] * 4


def test_a_late_tell_on_a_trial_that_another_driver_finished_does_not_crash(tmp_path: Path, stored: Callable) -> None:
    first = start(tmp_path, spec())
    proposal = first.ask()
    second = start(tmp_path, spec())
    same = second.ask()
    assert dict(same.overrides) == dict(proposal.overrides)
    second.tell(same, {LOSS: 1.0})
    first.tell(proposal, {LOSS: 1.0})
    first.tell(proposal, None)
    assert [(t.state.name, t.value) for t in stored(first).trials] == [("COMPLETE", 1.0)]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_value_that_is_no_number_fails_the_trial_and_never_becomes_best(
    tmp_path: Path, stored: Callable, bad: float | None
) -> None:
    search = start(tmp_path, spec("random", 3))
    first = search.ask()
    search.tell(first, None if bad is None else {LOSS: bad})
    drive(search)
    study = stored(search)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert math.isfinite(study.best_value) and study.best_trial.number != 0


def test_a_failed_trial_is_part_of_the_budget_and_is_proposed_again_on_resume(tmp_path: Path, stored: Callable) -> None:
    search = start(tmp_path, spec("random", 3))
    first = search.ask()
    search.tell(first, None)
    points = [dict(first.overrides), *drive(search)]
    again = start(tmp_path, spec("random", 3))
    assert drive(again) == points
    assert len(stored(again).trials) == 3


# --- bad spaces ------------------------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "empty space": {"space": {}},
    "empty choices": {"space": {"a": []}},
    "a number": {"space": {"a": 3}},
    "no high": {"space": {"a": {"low": 1}}},
    "unknown word": {"space": {"a": {"low": 1, "high": 2, "lgo": True}}},
    "upside down": {"space": {"a": {"low": 2.0, "high": 1.0}}},
    "ends that are no numbers": {"space": {"a": {"low": "x", "high": "y"}}},
    "one end that is no number": {"space": {"a": {"low": 0, "high": "y"}}},
    "an end that is missing": {"space": {"a": {"low": None, "high": 1}}},
    "log of zero": {"space": {"a": {"low": 0.0, "high": 1.0, "log": True}}},
    "log with a step": {"space": {"a": {"low": 1, "high": 9, "log": True, "step": 2}}},
    "step of nothing": {"space": {"a": {"low": 0.0, "high": 1.0, "step": 0.0}}},
    "no trials": {"num_trials": 0},
    "baseline that is no mapping": {"baselines": "best"},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_a_bad_space_is_refused_before_anything_runs(name: str, kind: str) -> None:
    with pytest.raises(ValueError):
        searches.build(spec(kind) | BAD[name])


def test_proposals_belong_to_their_part(tmp_path: Path) -> None:
    proposal: Proposal = start(tmp_path, spec(part="search")).ask()
    assert proposal.part == "search"


def test_a_trial_that_another_launch_has_only_just_asked_for_is_left_to_it(
    tmp_path: Path, stored: Callable[[Any], optuna.Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path, DESCRIBED)
    proposal = first.ask()
    study = stored(first)
    study.ask()  # another launch, between asking for its trial and marking it as its own
    second = start(tmp_path, DESCRIBED)
    assert second.ask() is not None
    assert [t.state.name for t in study.trials][:2] == ["RUNNING", "RUNNING"]
    first.tell(proposal, {LOSS: 1.0})
    monkeypatch.setattr("orchestrator.adapters.optuna_search.leases.Leases.GRACE_S", -1.0)
    third = start(tmp_path, DESCRIBED)
    third.tell(third.ask(), {LOSS: 1.0})  # the finished one, replayed
    third.ask()
    assert study.trials[1].state.name == "FAIL"  # its launch is taken to have died without having any parameters


def test_the_thread_that_renews_leases_ends_with_its_search(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    search = start(tmp_path, DESCRIBED)
    search.ask()
    (thread,) = [t for t in set(threading.enumerate()) - before if t.name == "leases"]
    assert thread.is_alive()
    del search
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
