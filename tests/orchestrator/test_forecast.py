"""The time left comes from what finished trials cost, not from what a plan allows."""

from __future__ import annotations

import pytest

from orchestrator.forecast import Forecast
from orchestrator.progress import Rates

FULL = 1024 * 5.0  # evaluations of a trial that goes all the way


def raced(trials: int, working: int | None = None) -> Forecast:
    """A part of equal trials, all of which lack their rows unless said otherwise."""
    lacking = trials if working is None else working
    return Forecast({"search": {"trials": trials, "working": lacking, "nfe": lacking * FULL}})


def end(forecast: Forecast, number: int, nfe: float, seconds: float) -> None:
    """One trial from its first shard to its last."""
    forecast.began(number, "search", FULL)
    forecast.spent("search", nfe, seconds, number)
    forecast.ended(number, "search")


def test_nothing_is_foretold_before_anything_was_made() -> None:
    forecast = raced(100)
    assert forecast.left_s() is None
    forecast.began(0, "search", FULL)
    assert forecast.left_s() is None


def test_trials_that_race_are_expected_to_cost_what_finished_ones_did() -> None:
    forecast = raced(100)
    for number in range(10):
        end(forecast, number, FULL / 4, 2.0)
    assert forecast.left_s() == pytest.approx(90 * 2.0)


def test_a_running_trial_owes_the_rest_of_what_it_is_expected_to_cost() -> None:
    forecast = raced(100)
    for number in range(10):
        end(forecast, number, FULL / 4, 2.0)
    forecast.began(10, "search", FULL)
    forecast.spent("search", FULL / 8, 1.0, 10)
    assert forecast.left_s() == pytest.approx(89 * 2.0 + 1.0)
    forecast.spent("search", FULL / 2, 4.0, 10)  # it went further than the others: it owes nothing any more
    assert forecast.left_s() == pytest.approx(89 * 2.0)


def test_a_grid_of_cheap_and_dear_trials_is_weighed_by_evaluations() -> None:
    forecast = Forecast({"grid": {"trials": 3, "working": 3, "nfe": 4.0 + 8.0 + 16.0}})
    forecast.began(0, "grid", 4.0)
    forecast.spent("grid", 4.0, 1.0, 0)
    forecast.ended(0, "grid")
    assert forecast.left_s() == pytest.approx(6.0)


def test_trials_that_the_store_has_cost_nothing_and_leave_nothing() -> None:
    forecast = raced(100)  # a continued search: its first trials are proposed again and found
    for number in range(60):
        forecast.began(number, "search", 0.0)
        forecast.ended(number, "search")
    end(forecast, 60, FULL, 3.0)
    assert forecast.left_s() == pytest.approx(39 * 3.0)
    known = raced(100, working=40)  # the plan knew already that 60 are there
    for number in range(60):
        known.began(number, "search", 0.0)
        known.ended(number, "search")
    end(known, 60, FULL, 3.0)
    assert known.left_s() == pytest.approx(39 * 3.0)


def test_a_refused_trial_leaves_nothing_behind() -> None:
    forecast = raced(4)
    end(forecast, 0, FULL, 3.0)
    forecast.ended(1, "search")
    assert forecast.left_s() == pytest.approx(2 * 3.0)


def test_a_part_without_a_finished_trial_counts_as_planned_at_the_common_pace() -> None:
    forecast = Forecast({
        "search": {"trials": 2, "working": 2, "nfe": 2 * FULL},
        "held_out": {"trials": 1, "working": 1, "nfe": 4 * FULL},
        "companions": {"trials": 0, "working": 0, "nfe": FULL},
    })  # fmt: skip
    end(forecast, 0, FULL / 4, 1.0)
    end(forecast, 1, FULL / 4, 1.0)
    assert forecast.left_s() == pytest.approx(16.0 + 4.0)
    forecast.spent("companions", FULL, 4.0)
    assert forecast.left_s() == pytest.approx(16.0)


def test_rates_are_of_the_last_minute_and_of_at_least_sixteen_shards() -> None:
    rates = Rates(0.0)
    for second in range(1, 301):
        rates.add(float(second), 10.0 if second <= 240 else 20.0, 50.0, 0.5)
    assert rates.per_second(300.0) == pytest.approx((20.0, 50.0, 0.5), rel=0.02)
    slow = Rates(0.0)
    for hour in range(1, 31):
        slow.add(3600.0 * hour, 3600.0, 0.0, 1800.0)
    assert slow.per_second(30 * 3600.0) == pytest.approx((1.0, 0.0, 0.5))
