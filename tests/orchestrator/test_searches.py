"""What all Optuna searches share: baselines, constraints, several objectives, storages, held-out winners, transfer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import pytest

from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.searches.confirm import HELD_OUT
from tasks.recipe import Recipe
from tasks.schedule import SolverSchedule

LOSS, COST = "quality/frechet", "cost/nfe"
NUMBERS = {"a": {"low": -5.0, "high": 5.0}, "b": {"low": -5.0, "high": 5.0}}


def recipe(**changes: Any) -> Recipe:
    return Recipe("gmm", "dpmpp_2m", "uniform", "none", "single").completed().override({"nfe": 4} | changes)  # type: ignore[arg-type]


def context(root: Path, seed: int = 0, storage: str | None = None, base: Recipe | None = None) -> SearchContext:
    return SearchContext(
        "study", f"key{seed}", seed, str(root), storage, {LOSS: "lower", COST: "lower", "reward/ink": "higher"},
        base or recipe(), 64, 0,
    )  # fmt: skip


def start(root: Path, seed: int = 0, storage: str | None = None, **spec: Any) -> Any:
    return searches.build({"held_out": 0, "space": NUMBERS} | spec).start(context(root, seed, storage))


def bowl(overrides: Mapping[str, Any]) -> dict[str, float]:
    """Best at (1, -2), with a valley across the axes."""
    a, b = overrides["a"] - 1, overrides["b"] + 2
    return {LOSS: (a + b) ** 2 + 0.05 * (a - b) ** 2, COST: abs(a)}


def drive(search: Any, value: Callable[[Mapping[str, Any]], dict[str, float]] = bowl) -> list[Any]:
    found = []
    while (proposal := search.ask()) is not None:
        found.append(proposal)
        search.tell(proposal, value(proposal.overrides))
    return found


# --- every algorithm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpe", "cmaes", "gp", "nsga2"])
def test_every_algorithm_beats_random_search(tmp_path: Path, name: str) -> None:
    trials = {"gp": 20, "nsga2": 150}.get(name, 60)

    def best(kind: str, seed: int) -> float:
        root = tmp_path / f"{kind}{seed}"
        root.mkdir()
        more = {"population": 12} if kind == "nsga2" else {}
        search = start(root, seed, f"journal://{root}/log", name=kind, num_trials=trials, **more)
        return min(bowl(p.overrides)[LOSS] for p in drive(search))

    assert median(best(name, s) for s in range(3)) < median(best("random", s) for s in range(3))


@pytest.mark.parametrize("name", ["tpe", "cmaes", "gp", "nsga2", "random"])
def test_an_interrupted_search_continues_as_if_undisturbed(tmp_path: Path, name: str) -> None:
    fields = {"name": name, "num_trials": 14, "space": NUMBERS | {"c": ["x", "y"]}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    undisturbed = [dict(p.overrides) for p in drive(start(whole, **fields))]
    first = start(parts, **fields)
    for _ in range(6):
        proposal = first.ask()
        first.tell(proposal, bowl(proposal.overrides))
    del first
    assert [dict(p.overrides) for p in drive(start(parts, **fields))] == undisturbed


def test_cmaes_keeps_the_choices_of_the_best_baseline_and_starts_at_its_numbers(tmp_path: Path) -> None:
    space = NUMBERS | {"kind": ["p", "q", "r"]}
    known = [{"kind": "p", "a": 4.0, "b": 4.0}, {"kind": "q", "a": 0.9, "b": -1.9}, {"kind": "r", "a": -4.0, "b": 0.0}]
    found = drive(start(tmp_path, name="cmaes", space=space, baselines=known, num_trials=40, sigma=0.05))
    assert [p.overrides for p in found[:3]] == known
    assert {p.overrides["kind"] for p in found[3:]} == {"q"}
    assert all(abs(p.overrides["a"] - 0.9) < 2.5 for p in found[3:9])


# --- baselines -------------------------------------------------------------------------------------------------------


def test_a_baseline_may_lie_outside_the_space_and_is_a_trial_like_others(tmp_path: Path) -> None:
    search = start(tmp_path, name="tpe", num_trials=3, baselines=[{"label": "known", "z": 1}])
    found = drive(search, lambda o: {LOSS: 0.5 if "z" in o else 1.0})
    assert found[0].overrides == {"z": 1} and found[0].baseline == "known"
    study = optuna.load_study(study_name=search.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert study.best_trial.user_attrs["solvus.baseline"] == "known"
    assert len(study.trials) == 4


def test_baselines_of_a_schedule_become_points_where_the_space_has_them(tmp_path: Path) -> None:
    space = {"schedule": {"times": "free", "order": [1, 2], "scale": {"low": 0.0, "high": 2.0}, "nfe": 4}}
    search = start(tmp_path, name="random", space=space, baselines="stock", num_trials=1)
    kinds = {known.name: known for known in search.baselines}
    assert kinds["dpm_solver_2, uniform, 4"].point is None  # singlestep blocks
    assert kinds["dpmpp_2m, uniform, 4"].is_exact
    assert not kinds["unipc, uniform, 4"].is_exact  # this space has no correctors


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, launches believe that they are another process (one that lives)."""
    monkeypatch.setattr("orchestrator.adapters.optuna_search.leases.os.getpid", lambda: 1)


def test_two_launches_try_each_baseline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"name": "random", "num_trials": 2, "baselines": [{"a": 0.0, "b": 0.0}, {"z": 1}]}
    one, two = start(tmp_path, **fields), start(tmp_path, **fields)
    asked = [one.ask()]
    elsewhere(monkeypatch)
    asked.append(two.ask())
    assert sorted(p.baseline for p in asked) == ["baseline 1", "baseline 2"]


# --- constraints -----------------------------------------------------------------------------------------------------

BUDGETED = {"nfe": {"low": 2, "high": 12}}


def test_proposals_that_cost_too_much_are_never_made_and_do_not_count(tmp_path: Path) -> None:
    search = start(tmp_path, name="random", space=BUDGETED, constraints={"nfe": 6}, num_trials=12)
    found = drive(search, lambda o: {LOSS: 1.0 / o["nfe"]})
    assert len(found) == 12 and max(p.overrides["nfe"] for p in found) == 6
    again = start(tmp_path, name="random", space=BUDGETED, constraints={"nfe": 6}, num_trials=12)
    assert [p.overrides for p in drive(again, lambda o: {LOSS: 1.0 / o["nfe"]})] == [p.overrides for p in found]


def test_a_trial_that_was_too_slow_does_not_win(tmp_path: Path) -> None:
    search = start(tmp_path, name="random", constraints={"device_s": 0.1}, num_trials=2)
    fast, slow = search.ask(), None
    search.tell(fast, {LOSS: 5.0, "study/device_s": 0.05})
    slow = search.ask()
    search.tell(slow, {LOSS: 1.0, "study/device_s": 0.5})
    study = optuna.load_study(study_name=search.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert study.best_value == 5.0


def test_a_constraint_that_nothing_can_meet_is_refused(tmp_path: Path) -> None:
    search = start(tmp_path, name="tpe", space=BUDGETED, constraints={"nfe": 1}, num_trials=3)
    with pytest.raises(ValueError, match="can hardly be met.*is above the constraint 1"):
        list(search.preview())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraints": {"nfes": 3}}, "did you mean 'nfe'"),
        ({"constraints": {"nfe": -1}}, "at least 0, got -1"),
        ({"objective": "quality/fid"}, "unknown objective 'quality/fid'"),
        ({"objectives": [LOSS]}, "two values or more"),
        ({"objectives": [LOSS, COST], "racing": {"start": 64}}, "one objective"),
        ({"refine": -1}, "refine must be at least 0"),
        ({"held_out": -1}, "held_out must be at least 0"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(tmp_path, name="tpe", **fields)


# --- several objectives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nsga2", "tpe", "random"])
def test_several_objectives_end_in_a_front_on_held_out_samples(tmp_path: Path, name: str) -> None:
    spec = {"name": name, "space": BUDGETED, "objectives": [LOSS, COST], "num_trials": 15, "held_out": 32}
    running = searches.build(spec).start(context(tmp_path))
    found = drive(running, lambda o: {LOSS: 10.0 / o["nfe"] + (o["nfe"] == 5), COST: float(o["nfe"])})
    held = [p for p in found if p.overrides.get("first_index") == HELD_OUT]
    seen = {p.overrides["nfe"] for p in found[: len(found) - len(held)]}
    front = {n for n in seen if not (n == 5 and 4 in seen)}
    assert {p.overrides["nfe"] for p in held} == front and len(front) <= 12
    assert all(p.overrides["num_samples"] == 32 for p in held)


# --- held out --------------------------------------------------------------------------------------------------------


def test_the_winner_and_the_best_baseline_are_measured_again(tmp_path: Path) -> None:
    known = [{"a": 5.0, "b": 5.0}, {"a": 0.0, "b": 0.0}]
    spec = {"name": "tpe", "space": NUMBERS, "num_trials": 20, "held_out": 32, "baselines": known}
    found = drive(searches.build(spec).start(context(tmp_path)))
    held = [p for p in found if "first_index" in p.overrides]
    best = min(found[:22], key=lambda p: bowl(p.overrides)[LOSS])
    assert [p.baseline for p in held] == ["", "baseline 2"]
    assert held[0].overrides == best.overrides | {"num_samples": 32, "first_index": HELD_OUT}


def test_held_out_samples_that_the_search_sees_are_refused(tmp_path: Path) -> None:
    inner = {"name": "random", "space": NUMBERS, "num_trials": 2}
    running = searches.build({"name": "confirm", "inner": inner, "first_index": 63}).start(context(tmp_path))
    with pytest.raises(ValueError, match=r"\[63, 2111\) overlap the search's own \[0, 64\)"):
        list(running.preview())


# --- storages --------------------------------------------------------------------------------------------------------


def test_a_journal_file_serves_several_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"journal://{tmp_path}/search.log"
    fields: dict[str, Any] = {"name": "random", "num_trials": 6}
    one, two = start(tmp_path, 0, storage, **fields), start(tmp_path, 0, storage, **fields)
    a = one.ask()
    elsewhere(monkeypatch)
    b = two.ask()
    assert a.overrides != b.overrides
    one.tell(a, bowl(a.overrides)), two.tell(b, bowl(b.overrides))
    assert len(drive(one)) == 4  # the two are known already: its own, and what the other did
    with pytest.raises(ValueError, match="names no file"):
        start(tmp_path, 0, "journal:", **fields).ask()


def test_a_trial_whose_launch_dies_later_is_taken_over_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"name": "random", "num_trials": 3}
    alive, doomed = start(tmp_path, **fields), start(tmp_path, **fields)
    mine = alive.ask()
    elsewhere(monkeypatch)
    lost = doomed.ask()
    alive.tell(mine, bowl(mine.overrides))
    last = alive.ask()
    alive.tell(last, bowl(last.overrides))
    assert alive.ask() is None  # the other launch holds its lease
    monkeypatch.setattr("orchestrator.adapters.optuna_search.leases.is_alive", lambda pid: False)
    again = alive.ask()
    assert again is not None and again.overrides == lost.overrides
    alive.tell(again, bowl(again.overrides))
    study = optuna.load_study(study_name=alive.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3


def test_changed_choices_are_another_optuna_study(tmp_path: Path) -> None:
    one = start(tmp_path, name="random", space={"c": [1, 2]}, num_trials=2)
    two = start(tmp_path, name="random", space={"c": [1, 2, 3]}, num_trials=2)
    more = start(tmp_path, name="random", space={"c": [1, 2]}, num_trials=9, parallel=3)
    assert one.name != two.name and one.name == more.name


def test_a_study_of_that_name_with_other_objectives_is_refused(tmp_path: Path) -> None:
    search = start(tmp_path, name="random", num_trials=2)
    optuna.create_study(study_name=search.name, storage=f"sqlite:///{tmp_path / 'optuna.db'}", direction="maximize")
    with pytest.raises(ValueError, match="with other objectives"):
        search.ask()


def test_the_summary_names_the_parameter_that_matters(tmp_path: Path) -> None:
    search = start(tmp_path, name="random", num_trials=40, part="p")
    drive(search, lambda o: {LOSS: 10 * o["a"] + 0.1 * o["b"], COST: 0.0})
    (entry,) = search.summary()
    assert entry["part"] == "p" and entry["finished"] == 40
    assert list(entry["importances"][0])[0] == "a" and entry["importances"][0]["a"] > 0.9


# --- transfer --------------------------------------------------------------------------------------------------------


def test_a_schedule_is_measured_on_every_target_beside_its_rivals(tmp_path: Path) -> None:
    found = recipe()
    schedule = found.override({"solver": {"name": "unified", "preset": "unipc"}})
    data = json.loads(schedule.parts.solver.schedule(found.parts.model.noising, found.grid[0]).to_json())
    spec = {
        "name": "transfer",
        "schedule": data,
        "models": ["gmm", "digits_flow"],
        "nfes": [4, 6],
        "rivals": ["dpmpp_2m"],
    }
    proposals = list(searches.build(spec).start(context(tmp_path)).preview())
    mine = [p for p in proposals if not p.baseline]
    assert [(p.overrides["model"], SolverSchedule.from_data(p.overrides["schedule"]).nfe) for p in mine] == [
        ("gmm", 4), ("gmm", 6), ("digits_flow", 4), ("digits_flow", 6),
    ]  # fmt: skip
    assert mine[0].overrides["schedule"]["times"] == data["times"]
    for proposal in proposals:
        over = {k: v for k, v in proposal.overrides.items() if k not in ("num_samples", "first_index")}
        recipe().override(over).check()
    assert {p.overrides["first_index"] for p in proposals} == {HELD_OUT}


def test_transfer_without_a_schedule_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a schedule. Set schedule=FILE"):
        searches.build({"name": "transfer"}).start(context(tmp_path, base=recipe(solver="ddim")))
