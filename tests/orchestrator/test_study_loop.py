"""The loop: everything proposed is told, failures are recorded and the rest continue, finished work is never redone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator import rows
from orchestrator.ledger import Ledger
from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches
from orchestrator.store import Store
from orchestrator.study import Study
from tasks import run as tasks_run
from tasks.metrics.mean_reward import MeanReward
from tasks.recipe import Recipe

INK = "reward/ink"
CONTEXT = SearchContext("study", "key", 0, "root", better={"quality/frechet": "lower", "reward/ink": "higher"})


class Scripted:
    """Proposes a list, at most ``width`` at a time, and remembers what it is told."""

    def __init__(self, *overrides: dict[str, Any], width: int = 100) -> None:
        self.left = [Proposal(o, "part", i) for i, o in enumerate(overrides)]
        self.width, self.flying, self.told = width, 0, []  # type: ignore[var-annotated]

    def start(self, context: SearchContext) -> Scripted:
        return self

    def ask(self) -> Proposal | None:
        if not self.left or self.flying == self.width:
            return None
        self.flying += 1
        return self.left.pop(0)

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        self.flying -= 1
        self.told.append((proposal.handle, values))

    def preview(self) -> Iterator[Proposal]:
        return iter(self.left)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, launch: Callable) -> Callable[..., SimpleNamespace]:
    """A function that runs a study with a scripted search."""

    def start(study: Study, search: Scripted) -> SimpleNamespace:
        monkeypatch.setattr("orchestrator.loop.searches", SimpleNamespace(build=lambda spec: search))
        return launch(study)

    return start


def steps(*counts: int) -> list[dict[str, Any]]:
    return [{"times.num_steps": count} for count in counts]


def break_generation(monkeypatch: pytest.MonkeyPatch, key: str, start: int) -> None:
    original = tasks_run.generate

    def broken(recipe: Recipe, low: int, high: int, *rest: Any, **more: Any) -> Any:
        if recipe.key == key and low == start:
            raise RuntimeError("the device fell off")
        return original(recipe, low, high, *rest, **more)

    monkeypatch.setattr(tasks_run, "generate", broken)


def damage(root: str, kind: str, key: str, name: str = "*") -> None:
    for path in (Path(root) / "store" / kind / key[:2] / key).glob(f"{name}.parquet"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


# --- asking and telling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 100])
def test_every_proposal_becomes_a_trial_in_order_and_is_told_its_values(
    make_study: Callable, scripted: Callable, width: int
) -> None:
    search = Scripted(*steps(2, 3, 4, 3), width=width)
    done = scripted(make_study(), search)
    assert [trial.number for trial in done.trials] == [0, 1, 2, 3]
    assert [trial.recipe.nfe for trial in done.trials] == [2, 3, 4, 3]
    assert {trial.state for trial in done.trials} == {"complete"}
    told = sorted(search.told, key=lambda t: t[0])
    assert told == [(i, t.told) for i, t in enumerate(done.trials)]
    assert all(t.values.items() <= t.told.items() and t.told["study/num_samples"] == 32 for t in done.trials)
    assert done.tracker.trials == done.trials
    assert done.trials[1].values == done.trials[3].values
    assert done.ledger.spent["rows"] == 3 * 32  # the repeated point cost nothing


def test_a_proposal_may_change_range_and_number_of_samples(
    make_study: Callable, scripted: Callable, generated: list
) -> None:
    done = scripted(make_study(), Scripted({"num_samples": 8, "first_index": 100}, {"num_samples": 4}))
    assert [(start, stop) for _, start, stop in generated] == [(100, 108), (0, 4)]
    assert [(t.first_index, t.num_samples, t.state) for t in done.trials] == [(100, 8, "complete"), (0, 4, "complete")]


def test_a_search_without_proposals_ends_at_once(make_study: Callable, scripted: Callable, generated: list) -> None:
    assert scripted(make_study(), Scripted()).trials == []
    assert generated == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": "many"}, "num_samples"),
        ({"first_index": -1}, "sample indices"),
        ({"first_index": 2**32}, "sample indices"),
        ({"first_index": "late"}, "first_index"),
        ({"solver": "ancestral"}, "ancestral steps masked processes, but model gmm is gaussian"),
        ({"sovler": "heun"}, "did you mean 'solver'"),
        ({"solver.etta": 1.0}, "did you mean 'eta'"),
    ],
)
def test_a_proposal_that_cannot_run_is_a_users_mistake(
    make_study: Callable, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_study().trial(0, Proposal(overrides))


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_shard_fails_its_trial_with_the_reason_and_the_others_continue(
    make_study: Callable, scripted: Callable, monkeypatch: pytest.MonkeyPatch, gmm: Recipe
) -> None:
    bad = gmm.override({"times.num_steps": 3})
    break_generation(monkeypatch, bad.key, 16)
    search = Scripted(*steps(2, 3, 4))
    done = scripted(make_study(num_samples=48), search)
    assert [trial.state for trial in done.trials] == ["complete", "failed", "complete"]
    assert done.trials[1].reason == f"shard {bad.key}/16-32 failed: RuntimeError: the device fell off"
    assert done.trials[1].values == {}
    assert dict(search.told)[1] is None
    assert done.watch.failed == 1
    kept = Store(make_study().root).committed("rows", bad.key)
    assert [(record.start, record.stop) for record in kept] == [(0, 16), (32, 48)]  # what worked is kept


def test_after_a_failure_the_next_launch_makes_only_what_is_missing(
    make_study: Callable, scripted: Callable, monkeypatch: pytest.MonkeyPatch, gmm: Recipe, generated: list
) -> None:
    with monkeypatch.context() as patch:
        break_generation(patch, gmm.key, 16)
        assert scripted(make_study(), Scripted({})).trials[0].state == "failed"
    generated.clear()
    assert scripted(make_study(), Scripted({})).trials[0].state == "complete"
    assert [(start, stop) for _, start, stop in generated] == [(16, 32)]


def test_a_sample_that_is_not_finite_is_set_aside(
    make_study: Callable, scripted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(
        "tasks.models.gmm.MixtureDenoiser.decode",
        lambda self, x0, cond=None: torch.where(x0 == x0.max(), math.inf, x0),
    )
    search = Scripted({})
    done = scripted(make_study(), search)
    (trial,) = done.trials
    assert trial.state == "degraded" and len(trial.quarantined) == 2  # one of each batch
    assert all("its decoding, though" in why for why in trial.quarantined.values())
    assert [number for number, values in search.told if values] == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_fails_its_trial(
    make_study: Callable, scripted: Callable, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    monkeypatch.setattr(MeanReward, "compute", lambda self, summary, reference: {INK: bad})
    search = Scripted({})
    done = scripted(make_study(), search)
    assert done.trials[0].state == "failed" and f"{INK} is {bad}" in done.trials[0].reason
    assert done.trials[0].values == {} and search.told == [(0, None)]


def test_a_point_that_cannot_run_fails_alone_when_a_search_comes_upon_it(
    make_study: Callable, scripted: Callable, gmm: Recipe
) -> None:
    # Nobody can foresee what a search over free nodes proposes: here, once, nodes that do not decrease.
    recipe = gmm.override({"times": {"name": "explicit", "values": [1.0, 0.6, 0.3, 0.0]}})
    search = Scripted(*({"times.values.1": middle} for middle in (0.5, 0.2, 0.7)), width=1)
    done = scripted(make_study(recipe=recipe), search)
    assert [trial.state for trial in done.trials] == ["complete", "failed", "complete"]
    assert "decreasing" in done.trials[1].reason
    assert search.told[1] == (1, None)


# --- damage while measuring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_corrupted_committed_shard_is_made_again_while_measuring(
    make_study: Callable, scripted: Callable, gmm: Recipe, generated: list, kind: str
) -> None:
    from tasks.registry import rewards

    study = make_study(num_samples=48)
    first = scripted(study, Scripted({})).trials[0]
    before = _samples(study, gmm, 48)
    shutil.rmtree(Path(study.root) / "store" / "values")
    key = gmm.key if kind == "rows" else gmm.column_key(rewards.complete("ink"))
    damage(study.root, kind, key, "0000000016-*")
    generated.clear()
    again = scripted(study, Scripted({})).trials[0]
    assert (again.state, again.values, again.errors) == ("complete", first.values, first.errors)
    assert [(start, stop) for _, start, stop in generated] == ([(16, 32)] if kind == "rows" else [])
    assert np.array_equal(_samples(study, gmm, 48), before)
    assert Store(study.root).verify()[1] == []


def test_corrupted_rows_are_made_again_when_a_new_scorer_needs_them(
    make_study: Callable, scripted: Callable, gmm: Recipe
) -> None:
    study = make_study(metrics=[])
    scripted(study, Scripted({}))
    damage(study.root, "rows", gmm.key, "0000000016-*")
    trial = scripted(make_study(), Scripted({})).trials[0]
    assert (trial.state, trial.reason) == ("complete", "")
    assert INK in trial.values


def _samples(study: Study, recipe: Recipe, stop: int) -> np.ndarray:
    return np.concatenate([rows.samples(t, (2,)) for t in Store(study.root).read("rows", recipe.key, 0, stop)])


# --- what is there is never run again --------------------------------------------------------------------------------


def test_a_finished_study_submits_nothing_and_says_the_same(
    make_study: Callable, scripted: Callable, generated: list
) -> None:
    first = scripted(make_study(), Scripted(*steps(2, 3)))
    assert len(generated) == 4
    generated.clear()
    second = scripted(make_study(), Scripted(*steps(2, 3)))
    assert generated == []
    assert [(t.values, t.errors, t.state) for t in second.trials] == [
        (t.values, t.errors, t.state) for t in first.trials
    ]
    assert [t.cost for t in second.trials] == [t.cost for t in first.trials]
    assert [t.fingerprint() for t in second.trials] == [t.fingerprint() for t in first.trials]
    assert second.ledger.summary()["rows"] == 0 and second.watch.reused == 64


def test_two_studies_share_the_rows_that_they_have_in_common(
    make_study: Callable, scripted: Callable, generated: list
) -> None:
    scripted(make_study(name="one"), Scripted(*steps(2, 3)))
    generated.clear()
    other = scripted(make_study(name="two"), Scripted(*steps(3, 4)))
    assert {key for key, _, _ in generated} == {other.trials[1].recipe.key}


def test_the_cost_of_a_trial_is_what_its_rows_cost_whoever_made_them(make_study: Callable, scripted: Callable) -> None:
    scripted(make_study(), Scripted({}))
    again = scripted(make_study(num_samples=24), Scripted({})).trials[0]
    assert again.cost["nfe"] == pytest.approx(24 * 4)
    assert again.cost["generate_s"] > 0


def test_rows_that_two_commits_hold_count_once_and_scores_cost_too(gmm: Recipe, tmp_path: Path) -> None:
    store, spec = Store(str(tmp_path)), {"name": "identity"}
    key = gmm.column_key(spec)
    table = pa.table({"sample_id": np.arange(16)})
    for start, stop in ((0, 8), (0, 16), (4, 12)):
        ledger = {"nfe": 10.0 * (stop - start), "generate_s": 1.0 * (stop - start)}
        store.put("rows", gmm.key, start, stop, table.slice(start, stop - start), ledger, {})
    store.put("columns", key, 0, 16, table, {"score_s": 144.0}, {})
    assert [(low, high) for _, low, high in store.used("rows", gmm.key, 2, 14)] == [(2, 14)]
    whole = Ledger(price_per_device_hour=3600.0).cost_of(gmm, [spec], 0, 16, store)
    assert (whole["nfe"], whole["generate_s"], whole["score_s"], whole["money"]) == (160.0, 16.0, 144.0, 160.0)
    half = Ledger().cost_of(gmm, [spec], 8, 16, store)
    assert (half["nfe"], half["score_s"]) == (80.0, 72.0)
    assert Ledger().cost_of(gmm, [], 0, 16, store)["score_s"] == 0.0


# --- searches --------------------------------------------------------------------------------------------------------


def drive(search: Any, objective: Callable[[Mapping[str, Any]], dict[str, float] | None]) -> list[Proposal]:
    """Ask and tell one at a time until the search has nothing more."""
    found = []
    while (proposal := search.ask()) is not None:
        found.append(proposal)
        search.tell(proposal, objective(proposal.overrides))
    return found


def shown(proposals: Any) -> list[tuple[dict[str, Any], str]]:
    return [(dict(p.overrides), p.part) for p in proposals]


def test_single_proposes_the_recipe_itself() -> None:
    search = searches.build({"name": "single", "part": "p"}).start(CONTEXT)
    assert shown(search.preview()) == shown(drive(search, lambda _: {})) == [({}, "p")]


def test_grid_proposes_every_combination_with_the_last_axis_fastest_as_previewed() -> None:
    spec = {"name": "grid", "part": "p", "set": {"seed": 1},
            "space": {"pair": [{"solver": "ddim", "times": "karras"}, {"solver": "heun"}], "nfe": [3, 5]}}  # fmt: skip
    search = searches.build(spec).start(CONTEXT)
    previewed = shown(search.preview())
    assert previewed == shown(drive(search, lambda _: {}))
    assert [overrides for overrides, _ in previewed] == [
        {"seed": 1, "solver": "ddim", "times": "karras", "nfe": 3},
        {"seed": 1, "solver": "ddim", "times": "karras", "nfe": 5},
        {"seed": 1, "solver": "heun", "nfe": 3},
        {"seed": 1, "solver": "heun", "nfe": 5},
    ]


def test_a_whole_spec_on_a_grid_is_one_value_of_its_axis() -> None:
    spec = {"name": "ddim", "eta": 0.5}
    search = searches.build({"name": "grid", "space": {"solver": [spec, "heun"]}}).start(CONTEXT)
    assert [p.overrides for p in search.preview()] == [{"solver": spec}, {"solver": "heun"}]


@pytest.mark.parametrize("space", [{}, {"nfe": []}, {"nfe": 4}, {"nfe": {"low": 1, "high": 2}}])
def test_grid_refuses_a_space_that_lists_nothing(space: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"search.*space"):
        searches.build({"name": "grid", "space": space})


def _grid(*nfe: int, part: str = "") -> dict[str, Any]:
    return {"name": "grid", "part": part, "space": {"nfe": [*nfe]}}


def test_a_plan_counts_what_equal_parts_of_a_sequence_share_once(make_study: Callable, tmp_path: Path) -> None:
    from orchestrator.foreseen import foreseen

    one = make_study()
    spec = {"name": "sequence", "parts": [{"name": "single", "part": name} for name in "ab"]}
    both = replace(one, search=searches.complete(spec))
    ahead = [foreseen(study, Store(str(tmp_path / "empty"))) for study in (one, both)]
    assert [a["trials"] for a in ahead] == [1, 2]
    assert ahead[0]["nfe"] == ahead[1]["nfe"] > 0 and ahead[0]["samples_to_make"] == ahead[1]["samples_to_make"]


def test_sequence_starts_a_part_only_when_nothing_of_the_one_before_is_in_flight() -> None:
    search = searches.build({"name": "sequence", "parts": [_grid(1, 2, part="a"), _grid(3, part="b")]}).start(CONTEXT)
    previewed = shown(search.preview())
    first, second = search.ask(), search.ask()
    assert search.ask() is None
    search.tell(second, None)
    assert search.ask() is None
    search.tell(first, {})
    third = search.ask()
    assert shown([first, second, third]) == previewed
    search.tell(third, {})
    assert search.ask() is None


@pytest.mark.parametrize("parts", [[], [{"name": "grid"}], [{"name": "gird", "space": {"nfe": [1]}}]])
def test_sequence_refuses_bad_parts(parts: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError):
        searches.build({"name": "sequence", "parts": parts})


CONFIRM = {
    "name": "confirm",
    "num_samples": 7,
    "first_index": 1000,
    "by": ["solver.name"],
    "inner": {
        "name": "grid",
        "part": "inner",
        "space": {"solver": ["ddim", {"name": "ddim", "eta": 1.0}, "heun"], "nfe": [3, 5]},
    },
}


@pytest.mark.parametrize(("objective", "best"), [("quality/frechet", 3), ("reward/ink", 5)])
def test_confirm_measures_the_best_of_each_group_again_on_held_out_indices(objective: str, best: int) -> None:
    search = searches.build(CONFIRM | {"objective": objective}).start(CONTEXT)
    held_out = {"num_samples": 7, "first_index": 1000}

    def value(overrides: Mapping[str, Any]) -> dict[str, float]:
        return {objective: overrides["nfe"] + (0.5 if overrides["solver"] == "ddim" else 0.0)}

    found = shown(drive(search, value))
    assert len(found) == 6 + 2
    assert {part for _, part in found[:6]} == {"inner"} and {part for _, part in found[6:]} == {"inner/held_out"}
    ddim = "ddim" if best == 5 else {"name": "ddim", "eta": 1.0}
    assert [overrides for overrides, _ in found[6:]] == [
        {"solver": ddim, "nfe": best} | held_out,
        {"solver": "heun", "nfe": best} | held_out,
    ]


def test_confirm_without_groups_picks_one_winner_and_adds_what_it_was_told_to() -> None:
    spec = CONFIRM | {"by": [], "also": [{"solver": "euler"}], "part": "again"}
    search = searches.build(spec).start(CONTEXT)
    found = shown(drive(search, lambda o: {"quality/frechet": (o.get("nfe") == 3) + float(o["solver"] != "heun")}))
    assert found[6:] == [
        ({"solver": "heun", "nfe": 5, "num_samples": 7, "first_index": 1000}, "again"),
        ({"solver": "euler", "num_samples": 7, "first_index": 1000}, "again"),
    ]


def test_confirm_never_picks_a_failed_trial_and_waits_for_those_in_flight() -> None:
    search = searches.build(CONFIRM | {"inner": _grid(3, 5), "by": []}).start(CONTEXT)
    first, second = search.ask(), search.ask()
    assert search.ask() is None
    search.tell(second, {"quality/frechet": 9.0})
    assert search.ask() is None
    search.tell(first, None)
    assert search.ask().overrides["nfe"] == 5
    assert search.ask() is None


def test_confirm_picks_the_same_winner_in_whatever_order_equal_values_arrive() -> None:
    winners = []
    for order in (1, -1):
        search = searches.build(CONFIRM | {"inner": _grid(3, 5), "by": []}).start(CONTEXT)
        for proposal in [search.ask(), search.ask()][::order]:
            search.tell(proposal, {"quality/frechet": 1.0})
        winners.append(search.ask().overrides["nfe"])
    assert winners[0] == winners[1]


def test_confirm_previews_as_many_trials_as_it_will_propose() -> None:
    search = searches.build(CONFIRM).start(CONTEXT)
    previewed = shown(search.preview())
    found = shown(drive(search, lambda o: {"quality/frechet": float(o["nfe"])}))
    assert previewed[:6] == found[:6]
    assert [part for _, part in previewed] == [part for _, part in found]


@pytest.mark.parametrize("name", ["confirm", "tpe", "random"])
def test_an_objective_that_no_metric_produces_is_refused_with_the_nearest(name: str) -> None:
    spec = {"name": name, "objective": "quality/frechte"}
    spec |= {"inner": _grid(3)} if name == "confirm" else {"space": {"nfe": [3]}}
    with pytest.raises(ValueError, match="did you mean 'quality/frechet'"):
        searches.build(spec).start(CONTEXT)


def test_a_confirmed_grid_runs_through_the_loop(make_study: Callable, launch: Callable, generated: list) -> None:
    spec = CONFIRM | {
        "objective": INK,
        "inner": CONFIRM["inner"] | {"space": {"solver": ["ddim", "heun"], "nfe": [3, 5]}},
    }
    study = replace(make_study(), search=searches.complete(spec))
    done = launch(study)
    assert [trial.state for trial in done.trials] == ["complete"] * 6
    assert [(t.first_index, t.num_samples, t.part) for t in done.trials[4:]] == [(1000, 7, "inner/held_out")] * 2
    for trial, group in zip(done.trials[4:], (done.trials[:2], done.trials[2:4]), strict=True):
        assert trial.recipe.key == max(group, key=lambda t: t.values[INK]).recipe.key
    generated.clear()
    launch(study)
    assert generated == []


def test_a_lost_executor_ends_the_launch_and_fails_no_trial(
    make_study: Callable, launch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import loop
    from orchestrator.ports import ExecutorLost

    def gone(shard: Any) -> Any:
        raise ExecutorLost("the pool broke")

    told: list[Any] = []
    monkeypatch.setattr(loop, "perform", gone)
    monkeypatch.setattr(loop._Loop, "finish", lambda _, trial: told.append(trial))
    with pytest.raises(ExecutorLost):
        launch(make_study())
    assert told == []


def test_a_trial_slower_than_its_cap_fails_with_the_numbers_and_keeps_its_rows(
    make_study: Callable, launch: Callable, gmm: Recipe
) -> None:
    slow = gmm.override({"strategy.budget": {"seconds": 1e-12}})
    study = make_study(recipe=slow)
    trial = launch(study).trials[0]
    assert trial.state == "failed" and "above strategy.budget.seconds=1e-12" in trial.reason
    again = launch(make_study(recipe=gmm.override({"strategy.budget": {"seconds": 100.0}})))
    assert again.trials[0].state == "complete" and again.ledger.spent["rows"] == 0  # the cap is no part of the key
    assert again.trials[0].values["cost/decodes"] == 0 and again.trials[0].seconds == trial.seconds > 0
