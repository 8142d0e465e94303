"""Metrics that compare rows with another recipe's: made once, first, for all trials, whatever is hurt or stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator import rows
from orchestrator.loop import MAX_ATTEMPTS
from orchestrator.measure import influences, paired_difference, scorers
from orchestrator.plan import companions
from orchestrator.ports import Proposal, WorkerLost
from orchestrator.registries import searches
from orchestrator.store import Store
from orchestrator.study import Study
from tasks import run as tasks_run
from tasks.recipe import Recipe

VALUE = "quality/trajectory_error"
METRIC = {"name": "trajectory", "num_steps": 20}
BUDGETS = [3, 5, 8]


@pytest.fixture
def study(make_study: Callable) -> Callable[..., Study]:
    """A grid over budgets with a trajectory error; keyword arguments replace fields."""

    def make(**changes: Any) -> Study:
        fields = {"metrics": [METRIC], "search": {"name": "grid", "space": {"nfe": BUDGETS}}}
        return make_study(**(fields | changes))

    return make


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


def companion_of(study: Study) -> Recipe:
    (need,) = scorers([spec for spec in study.metrics if spec["name"] == "trajectory"])
    other = study.recipe.companion(need)
    assert other is not None
    return other


def spans(calls: list, key: str) -> list[tuple[int, int]]:
    return sorted((start, stop) for made, start, stop in calls if made == key)


def samples(store: Store, recipe: Recipe, count: int) -> np.ndarray:
    tables = store.read("rows", recipe.key, 0, count)
    return np.concatenate([rows.samples(table, recipe.parts.model.shape) for table in tables]).astype(np.float64)


def states(done: SimpleNamespace) -> list[tuple[str, str]]:
    return [(trial.state, trial.reason) for trial in done.trials]


def values(done: SimpleNamespace) -> list[dict[str, float]]:
    return [trial.values for trial in done.trials]


def forget(root: str, *kinds: str) -> None:
    for kind in kinds:
        shutil.rmtree(Path(root) / "store" / kind)


def damage(root: str, key: str, name: str) -> None:
    (path,) = (Path(root) / "store" / "rows" / key[:2] / key).glob(f"{name}.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hurt(monkeypatch: pytest.MonkeyPatch, hit: Callable[[Recipe, int, int], BaseException | None]) -> None:
    """Let ``generate`` raise what ``hit`` returns."""
    original = tasks_run.generate

    def broken(recipe: Recipe, low: int, high: int, *rest: Any, **more: Any) -> Any:
        if (error := hit(recipe, low, high)) is not None:
            raise error
        return original(recipe, low, high, *rest, **more)

    monkeypatch.setattr(tasks_run, "generate", broken)


# --- made once, first ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True])
def test_many_trials_share_companion_rows_that_are_made_once_and_counted(
    study: Callable, launch: Callable, generated: list, threads: Threads, at_once: bool
) -> None:
    one = study()
    done = launch(one, threads if at_once else None)
    other = companion_of(one)
    assert states(done) == [("complete", "")] * 3
    assert spans(generated, other.key) == [(0, 16), (16, 32)]
    assert generated[0][0] == generated[1][0] == other.key  # first of all
    assert len(generated) == 2 + 2 * 3
    assert done.ledger.spent["nfe"] == 32 * (20 + sum(BUDGETS))
    assert [trial.cost["nfe"] for trial in done.trials] == [32 * nfe for nfe in BUDGETS]
    assert done.watch.reused == 0 and done.watch.shards == done.watch.shards_done == 8

    target = samples(done.store, other, 32)
    for trial in done.trials:
        apart = samples(done.store, trial.recipe, 32) - target
        assert trial.values[VALUE] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-6)
    errors = [trial.values[VALUE] for trial in done.trials]
    assert errors == sorted(errors, reverse=True)

    generated.clear()
    again = launch(one)
    assert generated == [] and values(again) == values(done) and again.watch.reused == 96


def test_threads_and_this_process_agree(study: Callable, launch: Callable, tmp_path: Path, threads: Threads) -> None:
    here = launch(study(root=str(tmp_path / "here")))
    there = launch(study(root=str(tmp_path / "there"), shard_size=7), threads)
    assert values(there) == values(here)
    assert [t.errors for t in there.trials] == [t.errors for t in here.trials]


def test_the_many_step_solution_as_a_trial_of_its_own_has_no_error_and_shares_its_rows(
    study: Callable, launch: Callable, generated: list
) -> None:
    many = {"solver": "dpmpp_2m", "times": {"name": "logsnr", "num_steps": 20}}
    space = {"as": [{"solver": "ddim"}, many]}
    done = launch(study(search={"name": "grid", "space": space}))
    assert done.trials[1].values[VALUE] == 0.0 and done.trials[1].errors[VALUE] == 0.0
    assert done.trials[0].values[VALUE] > 0.01
    assert len(generated) == 4


def test_growing_a_trial_makes_only_the_new_companion_rows(study: Callable, launch: Callable, generated: list) -> None:
    small = study(num_samples=40)
    launch(small)
    generated.clear()
    grown = launch(study(num_samples=64))
    assert spans(generated, companion_of(small).key) == [(40, 48), (48, 64)]
    fresh = launch(study(num_samples=64, root=small.root + "-fresh"))
    assert values(grown) == values(fresh)


def test_a_race_over_the_trajectory_error_grows_the_companion_with_its_trials_and_stops_losers(
    study: Callable, launch: Callable, generated: list, threads: Threads
) -> None:
    search = searches.complete(
        {"name": "random", "space": {"nfe": [2, 3, 5, 8, 12]}, "num_trials": 8, "objective": VALUE, "held_out": 0,
         "racing": {"start": 16, "factor": 2.0, "error": 0.2}, "parallel": 3}
    )  # fmt: skip
    one = study(search=search, num_samples=128)
    done = launch(one, threads)
    assert {trial.state for trial in done.trials} == {"complete"}
    assert spans(generated, companion_of(one).key) == [(low, low + 16) for low in range(0, 128, 16)]  # each once
    assert any(trial.stopped and trial.num_samples < 128 for trial in done.trials)
    best = min((t for t in done.trials if not t.stopped), key=lambda t: t.values[VALUE])
    assert best.recipe.nfe == max(t.recipe.nfe for t in done.trials)


def test_a_trajectory_error_of_a_finished_study_makes_companion_rows_alone(
    study: Callable, launch: Callable, generated: list
) -> None:
    launch(study(metrics=[]))
    generated.clear()
    one = study()
    done = launch(one)
    assert {key for key, _, _ in generated} == {companion_of(one).key} and len(generated) == 2
    assert states(done) == [("complete", "")] * 3
    assert done.watch.reused == 96


def test_columns_that_are_there_need_no_companion_rows(study: Callable, launch: Callable, generated: list) -> None:
    one = study()
    before = launch(one)
    folder = Path(one.root) / "store" / Store.folder("rows", companion_of(one).key)
    shutil.rmtree(folder)
    forget(one.root, "values")
    generated.clear()
    assert values(launch(one)) == values(before)
    assert generated == []


def test_trials_with_different_companions_have_each_made(
    study: Callable, launch: Callable, generated: list, threads: Threads
) -> None:
    search = {"name": "grid", "space": {"seed": [0, 1], "nfe": BUDGETS}}
    done = launch(study(search=search), threads)
    assert states(done) == [("complete", "")] * 6
    assert len(generated) == 2 * 2 + 6 * 2 and len(set(generated)) == len(generated)


def test_trials_on_other_rows_wait_and_have_theirs_made(
    study: Callable, launch: Callable, generated: list, threads: Threads
) -> None:
    space = {"num_samples": [16, 48], "nfe": BUDGETS}
    one = study(search={"name": "grid", "space": space})
    done = launch(one, threads)
    assert states(done) == [("complete", "")] * 6
    assert spans(generated, companion_of(one).key) == [(0, 16), (16, 32), (32, 48)]


def test_a_paired_comparison_is_sharper_than_independent_ones(study: Callable, launch: Callable) -> None:
    one = study(num_samples=256)
    done = launch(one)
    metric = one.metrics[0]
    found = [influences(t.recipe, metric, VALUE, 0, 256, done.store) for t in done.trials[:2]]
    difference, error = paired_difference(*found)
    apart = [t.values[VALUE] for t in done.trials[:2]]
    assert difference == pytest.approx(apart[0] - apart[1], rel=1e-9)
    assert error < np.hypot(*(t.errors[VALUE] for t in done.trials[:2]))


# --- hurt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [False, True])
def test_damaged_companion_rows_are_made_again(
    study: Callable, launch: Callable, generated: list, threads: Threads, at_once: bool
) -> None:
    one = study()
    before = launch(one)
    key = companion_of(one).key
    forget(one.root, "values", "columns")
    damage(one.root, key, "0000000016-*")
    generated.clear()
    after = launch(one, threads if at_once else None)
    assert states(after) == [("complete", "")] * 3 and values(after) == values(before)
    assert generated == [(key, 16, 32)]
    assert after.watch.reused == 96
    assert Store(one.root).verify()[1] == []


def test_companion_rows_that_are_damaged_again_and_again_fail_their_trial(
    study: Callable, launch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study(search={"name": "single"})
    key, original = companion_of(one).key, Store.put

    def bad(self: Store, kind: str, of: str, start: int, stop: int, *rest: Any) -> bool:
        made = original(self, kind, of, start, stop, *rest)
        if (kind, of, start) == ("rows", key, 0):
            damage(one.root, key, "0000000000-*")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", bad)
        (trial,) = launch(one).trials
    assert trial.state == "failed" and "measuring failed" in trial.reason and trial.attempts == MAX_ATTEMPTS
    assert states(launch(one)) == [("complete", "")]


def test_companion_rows_that_never_arrive_fail_their_trial_and_nothing_hangs(
    study: Callable, launch: Callable, monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    one = study()
    key, original = companion_of(one).key, Store.put

    def lost(self: Store, kind: str, of: str, *rest: Any) -> bool:
        return False if of == key else original(self, kind, of, *rest)

    monkeypatch.setattr(Store, "put", lost)
    done = launch(one, threads)
    assert [trial.state for trial in done.trials] == ["failed"] * 3
    assert all("its companion rows were made 4 times" in trial.reason for trial in done.trials)


def test_a_failing_companion_shard_fails_its_trials_with_the_reason_and_the_next_launch_goes_on(
    study: Callable, launch: Callable, generated: list, monkeypatch: pytest.MonkeyPatch, threads: Threads
) -> None:
    one = study()
    key = companion_of(one).key
    with monkeypatch.context() as patch:
        hurt(patch, lambda r, low, _: RuntimeError("it fell off") if (r.key, low) == (key, 16) else None)
        done = launch(one, threads)
    reason = f"companion shard {key}/16-32 failed: RuntimeError: it fell off"
    assert states(done) == [("failed", reason)] * 3
    assert {made for made, _, _ in generated} == {key}  # nothing was made in vain
    assert Store(one.root).get_json("recipes", key) is not None  # `solvus shard` finds it
    generated.clear()
    assert states(launch(one)) == [("complete", "")] * 3
    assert spans(generated, key) == [(16, 32)]


@pytest.mark.parametrize("at_once", [False, True])
def test_a_companion_row_that_kills_its_worker_is_set_aside_and_degrades_its_trials(
    study: Callable, launch: Callable, monkeypatch: pytest.MonkeyPatch, threads: Threads, at_once: bool
) -> None:
    one = study()
    key = companion_of(one).key
    with monkeypatch.context() as patch:
        hurt(patch, lambda r, low, high: WorkerLost("died") if r.key == key and low <= 21 < high else None)
        done = launch(one, threads if at_once else None)
    assert [trial.state for trial in done.trials] == ["degraded"] * 3
    assert [trial.quarantined for trial in done.trials] == [{21: f"its companion in {key}: died"}] * 3
    keep = [i for i in range(32) if i != 21]
    target = np.concatenate(
        [rows.samples(t, (2,)) for span in [(0, 21), (22, 32)] for t in done.store.read("rows", key, *span)]
    )
    for trial in done.trials:
        apart = samples(done.store, trial.recipe, 32)[keep] - target
        assert trial.values[VALUE] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-6)
    # Another launch finds everything as it was; taken out of quarantine, the row is made and the trials are whole.
    assert [trial.state for trial in launch(one).trials] == ["degraded"] * 3
    assert done.store.release(key) == 1
    whole = launch(one)
    assert states(whole) == [("complete", "")] * 3
    assert values(whole) == values(launch(study(root=one.root + "-undisturbed")))


def test_a_launch_that_is_stopped_goes_on_with_the_companion_rows_that_it_had(
    study: Callable, launch: Callable, generated: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study()
    key = companion_of(one).key
    for stop_at in (key, one.recipe.override({"nfe": 5}).key):
        with monkeypatch.context() as patch:
            hurt(patch, lambda r, low, _, at=stop_at: KeyboardInterrupt() if (r.key, low) == (at, 16) else None)
            with pytest.raises(KeyboardInterrupt):
                launch(one)
    done = launch(one)
    assert states(done) == [("complete", "")] * 3
    assert len(set(generated)) == len(generated) == 8  # every shard once
    assert values(done) == values(launch(study(root=one.root + "-undisturbed")))


def test_companion_rows_withdrawn_under_a_worker_are_made_again(
    study: Callable, launch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = study(search={"name": "single"})
    key, original, gone = companion_of(one).key, tasks_run.generate, []

    def withdrawn(recipe: Recipe, *rest: Any, **more: Any) -> Any:
        if recipe.key != key and not gone:
            store = Store(one.root)
            gone.extend(store.committed("rows", key))
            for record in gone:
                store.withdraw("rows", key, record)
        return original(recipe, *rest, **more)

    monkeypatch.setattr(tasks_run, "generate", withdrawn)
    assert states(launch(one)) == [("complete", "")] and len(gone) == 2


# --- planned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"solver": {"name": "ddim", "eta": 1.0}}, "solver ddim draws noise on the way"),
        ({"initial": "teleport"}, "initial teleport begins elsewhere"),
        ({"strategy": "best_of_n", "reward": "ink"}, "strategy best_of_n chooses"),
    ],
)
def test_a_trial_that_leaves_its_trajectory_is_refused_before_any_work(
    study: Callable, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        study().trial(0, Proposal(overrides))


def test_a_many_step_solution_that_cannot_be_sampled_is_refused(study: Callable) -> None:
    metric = METRIC | {"times": {"name": "explicit", "values": [1.0, 0.5, 0.0]}, "solver": {"name": "ancestral"}}
    with pytest.raises(ValueError, match=r"what metric trajectory compares with cannot be sampled|draws some"):
        study(metrics=[metric]).trial(0, Proposal({}))
    metric = METRIC | {"solver": {"name": "consistency"}}
    with pytest.raises(ValueError, match=r"what metric trajectory compares with cannot be sampled|draws some"):
        study(metrics=[metric]).trial(0, Proposal({}))


@pytest.mark.parametrize("name", ["frechet", "kid"])
def test_other_metrics_cannot_read_what_compares_rows_with_rows(make_study: Callable, name: str) -> None:
    one = make_study(metrics=[{"name": name, "features": "trajectory_distance"}])
    with pytest.raises(ValueError, match=f"metric {name} cannot read trajectory_distance"):
        one.trial(0, Proposal({}))


def test_companion_rows_are_cut_at_shard_boundaries_and_only_where_columns_are_missing(
    study: Callable, launch: Callable, store: Store
) -> None:
    one = study()
    needs = scorers(one.metrics)
    work = companions(one.recipe, needs, 8, 40, 16, store)
    assert [(s.key, s.start, s.stop, s.rows, s.scorers) for s in work] == [
        (companion_of(one).key, start, stop, True, ()) for start, stop in [(8, 16), (16, 32), (32, 40)]
    ]
    assert (len(work), work.samples) == (3, 32)
    launch(study(search={"name": "single"}, num_samples=24))
    assert [(s.start, s.stop) for s in companions(one.recipe, needs, 8, 40, 16, store)] == [(24, 32), (32, 40)]


ARGV = ["model=gmm", "name=errors", "num_samples=32", "batch_size=16", "shard_size=16", "search=grid",
        "search.space={nfe:[3,5]}", "metrics=[{name:trajectory,num_steps:20}]", "tracker=none"]  # fmt: skip


def test_a_plan_counts_companion_rows_once_and_a_run_makes_as_many(solvus: Callable, tmp_path: Path) -> None:
    argv = [*ARGV, f"root={tmp_path}"]
    plan = solvus("plan", *argv, "--json").data
    assert (plan["companions"], plan["samples"], plan["samples_to_make"], plan["shards"]) == (32, 64, 64, 6)
    assert plan["nfe"] == 32 * (20 + 3 + 5)
    assert "companions      32 samples" in solvus("plan", *argv).out
    done = solvus("run", *argv, "--json")
    assert done.code == 0, done.err
    assert (done.data["nfe"], done.data["samples_made"], done.data["samples_reused"]) == (plan["nfe"], 96, 0)
    after = solvus("plan", *argv, "--json").data
    assert (after["companions"], after["shards"], after["nfe"]) == (0, 0, 0)


def test_a_stochastic_solver_is_wrong_usage_for_a_trajectory_error(solvus: Callable, tmp_path: Path) -> None:
    done = solvus("plan", *ARGV, "solver=ddim", "solver.eta=1", f"root={tmp_path}")
    assert done.code == 2 and "solver ddim draws noise on the way" in done.err
