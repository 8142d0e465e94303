"""Estimators from one pool: unbiased over many simulated studies, intervals that cover, choices that are not lucky."""

import itertools
import math

import numpy as np
import pytest

from tasks.estimators import Estimate, best_of_k, best_split, choose, fit_scaling, jackknife, pass_at_k
from tasks.intervals import Z95

STUDIES = 10_000


@pytest.mark.parametrize(("p", "n", "k"), [(0.03, 20, 5), (0.2, 10, 3), (0.5, 6, 6), (0.4, 8, 1)])
def test_pass_at_k_is_unbiased_where_the_plug_in_is_not(p, n, k):
    correct = np.random.default_rng(0).binomial(n, p, STUDIES)
    found = pass_at_k(correct, n, k)
    error = found.std() / math.sqrt(STUDIES)
    exact = 1 - (1 - p) ** k
    assert abs(found.mean() - exact) < 5 * error
    if k > 1:
        assert exact - (1 - (1 - correct / n) ** k).mean() > 5 * error  # Jensen


def test_pass_at_k_and_the_plug_in_have_the_published_means():
    correct = np.random.default_rng(7).binomial(50, 0.03, 20 * STUDIES)
    found = pass_at_k(correct, 50, 10)
    assert abs(found.mean() - 0.26258) < 5 * found.std() / math.sqrt(len(found)) < 0.003
    assert abs((1 - (1 - correct / 50) ** 10).mean() - 0.242) < 0.003


def test_pass_at_k_counts_subsets():
    for c in range(6):
        right = [any(i < c for i in chosen) for chosen in itertools.combinations(range(5), 3)]
        assert pass_at_k(np.array([c]), 5, 3)[0] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_best_of_k_is_unbiased_for_the_largest_of_normals(k):
    exact = {1: 0.0, 2: 1 / math.sqrt(math.pi), 5: 1.16296447, 8: 1.42360031}[k]
    found = best_of_k(np.random.default_rng(1).normal(size=(STUDIES, 16)), k)
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(STUDIES)


def test_best_of_k_is_the_mean_over_all_subsets_ties_and_another_score_included():
    generator = np.random.default_rng(2)
    values = generator.normal(size=(4, 7))
    scores = generator.integers(0, 3, size=(4, 7)).astype(float)
    for k in (1, 3, 7):
        for row in range(4):
            expected = []
            for chosen in map(list, itertools.combinations(range(7), k)):
                top = scores[row, chosen] == scores[row, chosen].max()
                expected.append(values[row, chosen][top].mean())
            assert best_of_k(values, k, scores)[row] == pytest.approx(np.mean(expected))
            assert best_of_k(values, k)[row] == pytest.approx(
                np.mean([values[row, list(c)].max() for c in itertools.combinations(range(7), k)])
            )


def test_a_noisy_selector_is_worth_its_correlation():
    generator = np.random.default_rng(3)
    values = generator.normal(size=(STUDIES, 12))
    noisy = values + generator.normal(size=values.shape)
    found = best_of_k(values, 8, noisy)
    assert abs(found.mean() - 1.42360031 / math.sqrt(2)) < 5 * found.std() / math.sqrt(STUDIES)


def bootstrap(x, resamples):
    """The percentile interval of means over resampled prompts (Efron 1979)."""
    generator = np.random.default_rng(0)
    means = np.array([x[generator.integers(len(x), size=len(x))].mean() for _ in range(resamples)])
    return Estimate(x.mean(), means.std(ddof=1), *np.quantile(means, [0.025, 0.975]))


@pytest.mark.parametrize("method", [lambda x: bootstrap(x, 200), jackknife])
def test_intervals_cover_the_truth_as_often_as_they_say(method):
    pools = np.random.default_rng(4).normal(size=(400, 60, 8))
    covered = [e.low < 1 / math.sqrt(math.pi) < e.high for e in (method(best_of_k(pool, 2)) for pool in pools)]
    assert 0.90 < np.mean(covered) < 0.985  # five standard errors around 0.95, less the bootstrap's optimism


def test_the_normal_interval_is_that_of_all_others():
    found = jackknife(np.array([1.0, 2.0, 4.0, 9.0]))
    assert (found.low, found.high) == (found.value - Z95 * found.error, found.value + Z95 * found.error)


def test_a_power_law_is_found_again_with_intervals_around_it():
    x = [1, 2, 4, 8, 16, 32]
    truth = np.array([2.0 - 1.5 * k**-0.7 for k in x])
    exact = fit_scaling(x, truth)
    assert (exact.limit, exact.gain, exact.power) == pytest.approx((2.0, 1.5, 0.7), rel=0.02)
    assert exact(10) == pytest.approx(2.0 - 1.5 * 10**-0.7, rel=1e-3) and not exact.intervals
    noisy = fit_scaling(x, truth + 0.1 * np.random.default_rng(5).normal(size=(400, 6)))
    for name, value in (("limit", 2.0), ("gain", 1.5), ("power", 0.7)):
        low, high = noisy.intervals[name]
        assert low < value < high
    assert noisy.misfit < 1.5 and np.isnan(exact.misfit)
    steps = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]) + 0.1 * np.random.default_rng(5).normal(size=(400, 6))
    assert fit_scaling(x, steps).misfit > 5  # no power law, and it shows


def test_the_best_split_moves_to_longer_runs_as_the_budget_grows_and_reports_no_luck():
    generator = np.random.default_rng(6)
    # A longer run is better by a little and costs more: 1 / sqrt(steps) below the ceiling.
    costs = {str(t): float(t) for t in (2, 8, 32)}
    pools = {name: generator.normal(size=(400, 64)) - 4 / math.sqrt(cost) for name, cost in costs.items()}
    chosen = [best_split(pools, costs, budget).name for budget in (8, 64, 2048)]
    assert chosen == ["8", "8", "32"]
    # Equal arms: the best of thirty looks better than it is; the report on other prompts does not.
    flat = {str(i): generator.normal(size=(20, 1)) for i in range(30)}
    lucky = max(pool.mean() for pool in flat.values())
    found = best_split(flat, dict.fromkeys(flat, 1.0), 1.0)
    assert lucky > 0.35 and abs(found.estimate.value) < 0.35


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="needs 4 of them, got 3"):
        choose({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="k must lie between 1 and the 4 candidates"):
        best_of_k(np.zeros((2, 4)), 5)
    with pytest.raises(ValueError, match="finite"):
        best_of_k(np.array([[1.0, np.nan]]), 1)
    with pytest.raises(ValueError, match="between 0 and 4"):
        pass_at_k(np.array([5]), 4, 2)
    with pytest.raises(ValueError, match="four amounts"):
        fit_scaling([1, 2, 4], np.zeros(3))
    with pytest.raises(ValueError, match="pays for no candidate"):
        best_split({"a": np.zeros((4, 2))}, {"a": 10.0}, 5.0)
