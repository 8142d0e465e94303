"""Studies whose plug-ins look at the model first: calibrated once, counted, kept, and failed with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.plan import ARTIFACTS, uncalibrated
from orchestrator.results import Results
from orchestrator.store import Store
from orchestrator.study import Study
from tasks import calibration
from tasks import run as tasks_run
from tasks.recipe import Recipe, grid_of

GRID = {"name": "dp_steps", "num_fine": 12, "num_samples": 8}
COST = 12 * 8  # evaluations of that calibration


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(place, key) of every artifact that is made."""
    calls: list[tuple[str, str]] = []
    original = calibration.make

    def counted(recipe: Recipe, needed: calibration.Calibration, parts: Any) -> Any:
        calls.append((needed.place, needed.key))
        return original(recipe, needed, parts)

    monkeypatch.setattr(calibration, "make", counted)
    return calls


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipe's key at every call of ``generate``, artifacts and all."""
    calls: list[str] = []
    original = tasks_run.generate

    def counted(recipe: Recipe, *rest: Any, **named: Any) -> Any:
        calls.append(recipe.key)
        return original(recipe, *rest, **named)

    monkeypatch.setattr(tasks_run, "generate", counted)
    return calls


def grid_study(make_study: Callable[..., Study], gmm: Recipe, **space: Any) -> Study:
    recipe = gmm.override({"times": GRID | {"num_steps": 4}})
    return make_study(recipe=recipe, search={"name": "grid", "space": {"nfe": [3, 5]} | space})


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


def values_of(done: SimpleNamespace) -> list[dict[str, float]]:
    return [trial.values for trial in done.trials]


# --- in this process -------------------------------------------------------------------------------------------------


def test_a_grid_study_over_two_budgets_calibrates_once_and_a_rerun_not_at_all(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, generated: list
) -> None:
    study = grid_study(make_study, gmm)
    done = launch(study)
    assert [trial.state for trial in done.trials] == ["complete", "complete"]
    assert [place for place, _ in calibrated] == ["times"]
    assert [trial.recipe.nfe for trial in done.trials] == [3, 5]
    assert done.ledger.spent["nfe"] == 32 * (3 + 5) + COST
    # Every trial says what its calibration cost, whoever paid for it, apart from the evaluations of its samples.
    assert [trial.cost["calibration_nfe"] for trial in done.trials] == [COST, COST]
    assert [trial.cost["nfe"] for trial in done.trials] == [32 * 3, 32 * 5]

    calibrated.clear()
    generated.clear()
    again = launch(study)
    assert (calibrated, generated, again.ledger.spent["nfe"]) == ([], [], 0)
    assert values_of(again) == values_of(done)
    assert [trial.cost["calibration_nfe"] for trial in again.trials] == [COST, COST]


def test_the_trial_has_the_grid_that_was_found(make_study: Callable, launch: Callable, gmm: Recipe) -> None:
    done = launch(grid_study(make_study, gmm))
    for trial in done.trials:
        parts = calibration.bound(trial.recipe, calibration.make_all(trial.recipe))
        assert trial.times == pytest.approx(list(grid_of(parts)[0]), rel=1e-12)
        assert len(trial.times) == trial.recipe.nfe + 1


def test_rows_of_a_study_are_those_made_without_a_store(make_study: Callable, launch: Callable, gmm: Recipe) -> None:
    from orchestrator import rows
    from tasks.run import generate

    done = launch(grid_study(make_study, gmm))
    recipe = done.trials[0].recipe
    stored = np.concatenate([rows.samples(t, (2,)) for t in done.store.read("rows", recipe.key, 0, 32)])
    np.testing.assert_array_equal(stored, generate(recipe, 0, 32)["x0"])


def test_an_artifact_is_kept_with_its_origin_and_cost(make_study: Callable, launch: Callable, gmm: Recipe) -> None:
    done = launch(grid_study(make_study, gmm))
    (needed,) = done.trials[0].recipe.calibrations
    meta, arrays = done.store.get_json(ARTIFACTS, needed.key), done.store.get_arrays(ARTIFACTS, needed.key)
    assert meta["cost"]["nfe"] == COST and meta["plugin"] == "dp_steps" and "commit" in meta["origin"]
    assert arrays["costs"].shape == (13, 13)


def test_a_damaged_artifact_is_made_again(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, generated: list
) -> None:
    study = grid_study(make_study, gmm)
    done = launch(study)
    key = done.trials[0].recipe.calibrations[0].key
    folder = Path(study.root) / "store" / Store.folder(ARTIFACTS, key)
    files = [p for p in folder.parent.rglob("*") if p.is_file() and p.suffix != ".json" and key in str(p)]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    calibrated.clear()
    generated.clear()
    again = launch(study)
    assert values_of(again) == values_of(done)
    assert len(calibrated) == 1 and generated == []  # the rows are there still


def test_a_withdrawn_record_of_an_artifact_is_made_again_with_its_cost(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, generated: list
) -> None:
    study = grid_study(make_study, gmm)
    done = launch(study)
    key = done.trials[0].recipe.calibrations[0].key
    (path,) = (Path(study.root) / "store" / ARTIFACTS).rglob(f"{key}.json")
    path.write_bytes(path.read_bytes()[:-5])
    (line,) = done.store.verify(withdraw=True)[1]
    assert f"{key}.json" in line and done.store.verify()[1] == []
    calibrated.clear()
    generated.clear()
    again = launch(study)
    assert values_of(again) == values_of(done)
    assert len(calibrated) == 1 and generated == []
    assert [trial.cost["calibration_nfe"] for trial in again.trials] == [COST, COST]


@pytest.mark.parametrize("budgets", [[3, 5], [2, 3, 4, 5, 6]])
def test_trials_in_flight_together_wait_for_one_artifact(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, threads: Threads, budgets: list[int]
) -> None:
    study = grid_study(make_study, gmm, nfe=budgets)
    done = launch(study, threads)
    assert [trial.state for trial in done.trials] == ["complete"] * len(budgets)
    assert len(calibrated) == 1
    assert done.ledger.spent["nfe"] == 32 * sum(budgets) + COST


def test_trials_with_different_artifacts_have_each_made(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, threads: Threads
) -> None:
    study = grid_study(make_study, gmm, **{"times.num_fine": [12, 16]})
    done = launch(study, threads)
    assert [trial.state for trial in done.trials] == ["complete"] * 4
    assert len(calibrated) == 2 and len(set(calibrated)) == 2
    costs = {trial.recipe.times["num_fine"]: trial.cost["calibration_nfe"] for trial in done.trials}
    assert costs == {12: 12 * 8, 16: 16 * 8}


def test_calibrations_of_one_recipe_are_made_in_order_and_shared(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, threads: Threads
) -> None:
    recipe = gmm.override({"times": GRID | {"num_steps": 4}, "initial": {"name": "teleport", "num_data": 100}})
    hook = {"name": "compensation", "num_samples": 2, "num_held_out": 2, "num_reference": 8}
    recipe = recipe.override({"solver": {"name": "unified", "preset": "unipc", "hooks": [hook]}})
    done = launch(make_study(recipe=recipe, search={"name": "grid", "space": {"nfe": [3, 5]}}), threads)
    assert [trial.state for trial in done.trials] == ["complete", "complete"]
    places = [place for place, _ in calibrated]
    assert sorted(places) == ["initial", "solver.hooks.0", "solver.hooks.0", "times"]
    assert uncalibrated(done.trials[0].recipe, done.store) == []
    for trial in done.trials:
        assert trial.cost["calibration_nfe"] > COST


def test_a_failing_calibration_fails_its_trials_with_the_reason_and_the_others_go_on(
    make_study: Callable, launch: Callable, gmm: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = calibration.make

    def broken(recipe: Recipe, needed: calibration.Calibration, parts: Any) -> Any:
        if recipe.times.get("num_fine") == 16:
            raise RuntimeError("the device fell off")
        return original(recipe, needed, parts)

    study = grid_study(make_study, gmm, **{"times.num_fine": [16, 12]})
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "make", broken)
        done = launch(study)
    states = {(t.recipe.times["num_fine"], t.recipe.nfe): (t.state, t.reason) for t in done.trials}
    for nfe in (3, 5):
        assert states[12, nfe] == ("complete", "")
        state, reason = states[16, nfe]
        assert state == "failed" and reason == "calibration failed: RuntimeError: the device fell off"
    assert done.tracker.trials and len(done.tracker.trials) == 4
    # The next launch tries again.
    assert [trial.state for trial in launch(study).trials] == ["complete"] * 4


def test_trials_that_waited_for_a_failing_calibration_fail_too(
    make_study: Callable, launch: Callable, gmm: Recipe, monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("nothing to see")

    monkeypatch.setattr(calibration, "make", broken)
    done = launch(grid_study(make_study, gmm, nfe=[2, 3, 4, 5]), threads)
    assert [trial.state for trial in done.trials] == ["failed"] * 4
    assert {trial.reason for trial in done.trials} == {"calibration failed: ValueError: nothing to see"}


def test_a_calibration_that_kills_its_worker_fails_its_trial(
    make_study: Callable, launch: Callable, gmm: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.ports import WorkerLost

    def lost(*_: Any) -> Any:
        raise WorkerLost("the worker is gone")

    monkeypatch.setattr(calibration, "make", lost)
    done = launch(grid_study(make_study, gmm))
    assert [trial.state for trial in done.trials] == ["failed", "failed"]
    assert all("WorkerLost: the worker is gone" in trial.reason for trial in done.trials)


def test_an_artifact_file_is_used_and_nothing_is_calibrated(
    make_study: Callable, launch: Callable, gmm: Recipe, calibrated: list, tmp_path: Path
) -> None:
    study = grid_study(make_study, gmm)
    done = launch(study)
    (needed,) = done.trials[0].recipe.calibrations
    path = tmp_path / "grid.safetensors"
    calibration.save(path, needed.meta, done.store.get_arrays(ARTIFACTS, needed.key))
    calibrated.clear()
    filed = make_study(recipe=study.recipe.override({"times.artifact": str(path)}), search=study.search)
    from_file = launch(filed)
    assert calibrated == []
    assert values_of(from_file) == values_of(done)
    assert [trial.times for trial in from_file.trials] == [trial.times for trial in done.trials]


def test_a_file_for_the_times_serves_the_calibrations_that_come_after(
    make_study: Callable, launch: Callable, gmm: Recipe, tmp_path: Path
) -> None:
    recipe = gmm.override({"times": GRID | {"num_steps": 4}})
    (needed,) = recipe.calibrations
    path = tmp_path / "grid.safetensors"
    calibration.save(path, needed.meta, calibration.make_all(recipe)[needed.key])
    hook = {"name": "compensation", "num_samples": 2, "num_held_out": 2, "num_reference": 8}
    solver = {"name": "unified", "preset": "unipc", "hooks": [hook]}
    done = launch(make_study(recipe=recipe.override({"times.artifact": str(path), "solver": solver})))
    assert [(trial.state, trial.reason) for trial in done.trials] == [("complete", "")]


# --- from the command line -------------------------------------------------------------------------------------------

ARGV = ["run", "model=gmm", "name=fitted", "num_samples=32", "batch_size=32", "shard_size=32", "times=dp_steps",
        "times.num_fine=12", "times.num_samples=8", "search=grid", "search.space={nfe:[3,5]}",
        "tracker=none"]  # fmt: skip


def test_the_command_line_calibrates_once_and_writes_the_cost_into_the_trial_table(
    solvus: Callable[..., SimpleNamespace], tmp_path: Path, calibrated: list, generated: list
) -> None:
    argv = [*ARGV, f"root={tmp_path}", "--json"]
    first = solvus(*argv)
    assert first.code == 0, first.err
    assert first.data["nfe"] == 32 * (3 + 5) + COST
    assert len(calibrated) == 1
    table = Results(str(tmp_path), "fitted").trials()
    assert [row["cost/calibration_nfe"] for row in table] == [COST, COST]
    assert [len(json.loads(row["times"])) for row in table] == [4, 6]
    calibrated.clear()
    generated.clear()
    second = solvus(*argv)
    assert second.code == 0 and (second.data["nfe"], second.data["samples_made"]) == (0, 0)
    assert (calibrated, generated) == ([], [])


def test_a_failing_calibration_is_exit_status_one_with_its_reason(
    solvus: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    done = solvus(*ARGV, "model.means=[[1e39,0]]", "model.covariances=[1.0]", f"root={tmp_path}")
    assert done.code == 1
    assert "calibration failed: ValueError: the calibration of times gave" in done.out + done.err
    assert "Traceback" not in done.err


def test_a_missing_artifact_file_is_wrong_usage(solvus: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    done = solvus(*ARGV, "times.artifact=nowhere.safetensors", f"root={tmp_path}")
    assert done.code == 2
    assert "artifact 'nowhere.safetensors' does not exist" in done.err


def test_a_plan_says_how_many_calibrations_come_first(solvus: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    argv = ["study=tiny", "search=grid", "search.space={nfe:[3,5]}", "times=dp_steps", "times.num_fine=12"]
    argv += ["num_samples=32", "tracker=none", f"root={tmp_path}"]
    assert solvus("plan", *argv, "--json").data["calibrations"] == 1
    assert solvus("run", *argv, "--json").code == 0
    assert solvus("plan", *argv, "--json").data["calibrations"] == 0
