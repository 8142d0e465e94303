"""Racing: the error rate that it states, growth that computes only what is new, losers that stop early."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator import racing
from orchestrator.measure import Influences
from orchestrator.ports import Proposal
from orchestrator.racing import Race, Racing
from orchestrator.registries import searches
from tasks.registry import metrics as metric_registry

LOSS = "reward/ink"
METRICS = [metric_registry.complete({"name": "mean_reward", "reward": "ink"})]


class Draws:
    """Trials whose rows are known numbers, (n,) each, in place of stored ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, np.ndarray] = {}

        def influences(
            recipe: Any, spec: Any, name: str, first: int, stop: int, store: Any, cluster: Any = None
        ) -> Any:
            part = self.rows[recipe][first:stop]
            return Influences(float(np.nanmean(part)), part - np.nanmean(part))

        monkeypatch.setattr(racing, "influences", influences)

    def run(
        self, race: Race, name: str, rows: np.ndarray, settled: int = 0, seconds: float = 0.1, may_win: bool = True
    ) -> Any:
        """One trial through the race; it comes back with its looks."""
        self.rows[name] = rows
        trial = SimpleNamespace(
            recipe=name, first_index=0, num_samples=settled or race.start, looks=[], stopped=False, estimate=None,
            seconds=seconds,
            proposal=Proposal({}, settled=bool(settled)),
        )  # fmt: skip
        while True:
            trial.values = {LOSS: float(np.nanmean(rows[: trial.num_samples]))}
            more = race.look(trial, METRICS, None, may_win=may_win)
            if more is None:
                return trial
            trial.num_samples = more


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


def a_race(minimize: bool = True, full: int = 4096, **settings: Any) -> Race:
    return Race(Racing(**settings), LOSS, minimize, full)


def test_looks_grow_by_the_factor_and_end_at_the_full_number() -> None:
    assert Racing(start=256, factor=2.0).looks(4096) == (256, 512, 1024, 2048, 4096)
    assert Racing(start=100, factor=3.0).looks(1000) == (100, 300, 900, 1000)
    assert Racing(start=256).looks(64) == (64,)


@pytest.mark.parametrize(("mine", "theirs"), [((0,), ()), ((200,), ()), ((), (0,)), ((7,), (200,))])
def test_rows_in_quarantine_leave_the_others_paired(draws: Draws, mine: tuple[int], theirs: tuple[int]) -> None:
    base = np.random.default_rng(3).standard_normal(4096)
    best, worse = base.copy(), base + 0.3
    best[list(theirs)], worse[list(mine)] = np.nan, np.nan
    race = a_race(start=256)
    draws.run(race, "best", best)
    trial = draws.run(race, "worse", worse)
    assert trial.stopped and trial.num_samples == 256
    assert trial.looks[0].difference == pytest.approx(0.3, abs=0.03) and trial.looks[0].error < 1e-9


@pytest.mark.parametrize(("seconds", "may_win"), [(2.0, True), (0.5, False)])
def test_a_trial_that_fails_for_its_time_holds_nobody_back(draws: Draws, seconds: float, may_win: bool) -> None:
    base = np.random.default_rng(3).standard_normal(4096)
    race = Race(Racing(start=256), LOSS, True, 4096, device_s=1.0)
    fast = draws.run(race, "too slow", base - 1.0, seconds=seconds, may_win=may_win)
    assert not fast.stopped
    later = draws.run(race, "later", base)
    assert not later.stopped and later.num_samples == 4096
    assert draws.run(race, "worse", base + 0.3).stopped


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_an_equally_good_trial_is_stopped_no_more_often_than_stated(draws: Draws, error: float) -> None:
    # Equal true values and no margin: the boundary of the claim. 600 races; three standard errors of slack.
    generator, stopped, count = np.random.default_rng(1), 0, 600
    for _ in range(count):
        race = a_race(full=512, start=64, error=error)
        shared = generator.normal(size=512)
        draws.run(race, "incumbent", shared + generator.normal(size=512) * 0.5)
        stopped += draws.run(race, "rival", shared + generator.normal(size=512) * 0.5).stopped
    slack = 3 * (error * (1 - error) / count) ** 0.5
    assert stopped / count < error + slack
    assert stopped / count > 0.3 * error  # nor is the rule so cautious that it never stops anybody


def test_a_trial_better_by_the_margin_is_stopped_less_often_than_stated(draws: Draws) -> None:
    generator, stopped, count = np.random.default_rng(2), 0, 300
    for _ in range(count):
        race = a_race(full=1024, start=64, error=0.1, margin=0.05)
        shared = 10.0 + generator.normal(size=1024)
        draws.run(race, "incumbent", shared + generator.normal(size=1024) * 2)
        stopped += draws.run(race, "rival", shared - 0.5 + generator.normal(size=1024) * 2).stopped
    assert stopped / count < 0.1


def test_a_clear_loser_stops_at_the_first_look_and_says_what_it_would_have_had(draws: Draws) -> None:
    generator, race = np.random.default_rng(3), a_race()
    shared = generator.normal(size=4096)
    best = draws.run(race, "best", shared)
    loser = draws.run(race, "loser", shared + 1.0 + 0.1 * generator.normal(size=4096))
    assert best.num_samples == 4096 and not best.stopped
    assert loser.num_samples == 256 and loser.stopped
    assert loser.estimate == pytest.approx(shared.mean() + 1.0, abs=5 * 0.1 / 256**0.5)
    assert loser.looks[0].difference == pytest.approx(1.0, abs=0.05)


def test_more_is_better_where_the_metric_says_so(draws: Draws) -> None:
    generator, race = np.random.default_rng(4), a_race(minimize=False)
    shared = generator.normal(size=4096)
    draws.run(race, "best", shared + 1.0)
    assert draws.run(race, "loser", shared).stopped
    assert not draws.run(race, "better", shared + 2.0).stopped


def test_a_stopped_trial_is_never_estimated_above_the_incumbent(draws: Draws) -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        race = a_race(full=1024, start=64, error=0.4, margin=0.5)
        shared = 1.0 + generator.normal(size=1024)
        draws.run(race, "best", shared)
        trial = draws.run(race, "close", shared + 0.3 * generator.normal(size=1024) - 0.01)
        assert not trial.stopped or trial.estimate > shared.mean()


def test_a_new_winner_is_the_next_incumbent(draws: Draws) -> None:
    generator, race = np.random.default_rng(6), a_race()
    shared = generator.normal(size=4096)
    draws.run(race, "first", shared)
    draws.run(race, "second", shared - 1.0)
    third = draws.run(race, "third", shared - 0.5 + 0.1 * generator.normal(size=4096))
    assert third.stopped and third.estimate == pytest.approx(shared.mean() - 0.5, abs=0.05)


def test_a_trial_that_an_earlier_launch_decided_is_not_grown(draws: Draws) -> None:
    generator, race = np.random.default_rng(7), a_race()
    shared = generator.normal(size=4096)
    draws.run(race, "first", shared)
    again = draws.run(race, "again", shared - 5.0, settled=512)
    assert again.num_samples == 512 and len(again.looks) == 1


# --- in a study ------------------------------------------------------------------------------------------------------

SPACE = {"solver": [{"name": "ddim", "eta": 0.0}, {"name": "ddim", "eta": 1.0}, "heun", "dpmpp_2m"], "nfe": [2, 3, 4]}


def raced(num_trials: int = 10, **fields: Any) -> dict[str, Any]:
    return {
        "name": "random", "space": SPACE, "num_trials": num_trials, "objective": "quality/frechet", "held_out": 0,
        "racing": {"start": 32, "factor": 2.0, "error": 0.2},
    } | fields  # fmt: skip


@pytest.fixture
def raced_study(make_study: Callable) -> Callable:
    def make(**fields: Any) -> Any:
        metric = {"name": "frechet", "features": "identity"}
        return make_study(metrics=[metric], search=searches.complete(raced(**fields)), num_samples=256, shard_size=64)

    return make


def test_growing_computes_only_the_new_rows(raced_study: Callable, launch: Callable, generated: list) -> None:
    done = launch(raced_study())
    made = {(key, index) for key, start, stop in generated for index in range(start, stop)}
    assert sum(stop - start for _, start, stop in generated) == len(made)  # no row twice
    spans = {(t.recipe.key, t.num_samples) for t in done.trials}
    assert len(made) == sum(max(n for k, n in spans if k == key) for key in {k for k, _ in spans})
    assert {t.num_samples for t in done.trials} > {256} and any(t.stopped for t in done.trials)
    assert all(t.num_samples == 256 for t in done.trials if not t.stopped)


def test_the_winner_of_a_race_is_the_winner_without_one(raced_study: Callable, launch: Callable) -> None:
    fast = launch(raced_study(num_trials=60)).trials  # all twelve points, in either order
    slow = launch(raced_study(num_trials=60, racing={})).trials
    name = "quality/frechet"
    best = min((t for t in fast if not t.stopped), key=lambda t: t.values[name])
    assert best.values[name] == min(t.values[name] for t in slow)
    assert sum(t.num_samples for t in fast) < sum(t.num_samples for t in slow)


def test_a_raced_study_says_the_same_after_an_interruption(
    raced_study: Callable, launch: Callable, generated: list, tmp_path: Any
) -> None:
    whole = launch(raced_study())
    calls = len(generated)
    again = launch(raced_study())
    assert len(generated) == calls  # nothing new
    assert [(t.num_samples, t.stopped, t.values) for t in again.trials] == [
        (t.num_samples, t.stopped, t.values) for t in whole.trials
    ]


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"start": 2}, "start"), ({"factor": 1.0}, "factor"), ({"error": 0.7}, "error"), ({"margin": -1.0}, "margin"),
     ({"stat": 3}, "did you mean 'start'")],
)  # fmt: skip
def test_a_race_that_makes_no_sense_is_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        searches.build(raced(racing=settings))
