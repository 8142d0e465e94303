"""Laws of coverage: found again from their own counts, and what each says beyond the candidates that were drawn."""

import math
from functools import cache

import numpy as np
import pytest

from tasks.coverage_laws import fit_coverage

ALPHA, BETA, N, PROMPTS = 0.35, 2.0, 100, 800


def counts(unreachable, seed, prompts=PROMPTS):
    generator = np.random.default_rng(seed)
    p = generator.beta(ALPHA, BETA, prompts)
    p[generator.random(prompts) < unreachable] = 0.0
    return generator.binomial(N, p)


def truth(k, unreachable=0.0):
    missed = math.lgamma(BETA + k) - math.lgamma(BETA) + math.lgamma(ALPHA + BETA) - math.lgamma(ALPHA + BETA + k)
    return (1 - unreachable) * (1 - math.exp(missed))


@cache
def fitted(unreachable, seed):
    return {law.name: law for law in fit_coverage(counts(unreachable, seed), N, resamples=0)}


def rmse(unreachable, name, studies=4):
    errors = [fitted(unreachable, seed)[name](1000) - truth(1000, unreachable) for seed in range(studies)]
    return float(np.sqrt(np.mean(np.square(errors))))


def test_where_everything_is_reachable_the_beta_law_extrapolates_best():
    """Published, k = 1000 from n = 100: .0144 for the power law, .0071 for the beta law, .0206 with p0."""
    assert rmse(0.0, "beta") < 0.016 and rmse(0.0, "power") < 0.03 and rmse(0.0, "saturating beta") < 0.04
    assert rmse(0.0, "beta") < rmse(0.0, "power")


def test_where_some_prompts_are_out_of_reach_only_the_law_that_saturates_extrapolates():
    """Published: .0792, .0739 and .0137, with p0 at .143 for 15 %."""
    saturating = rmse(0.15, "saturating beta")
    assert saturating < 0.045 and rmse(0.15, "power") > 0.05 > saturating
    shares = [fitted(0.15, seed)["saturating beta"].parameters["p0"] for seed in range(4)]
    assert abs(np.mean(shares) - 0.15) < 0.05


def test_bic_takes_the_third_parameter_only_where_it_is_needed():
    assert all(min(fitted(0.0, s).values(), key=lambda law: law.bic).name != "saturating beta" for s in range(4))
    many = fit_coverage(counts(0.3, 0, prompts=3000), N, resamples=0)
    assert many[0].name == "saturating beta" and many[0].bic < many[1].bic < many[2].bic
    assert abs(many[0].parameters["p0"] - 0.3) < 0.05


def test_the_exponent_of_the_power_law_depends_on_the_range_and_its_interval_may_miss_the_tail():
    """A Beta(alpha, .) tail decays as k^-alpha; published for alpha = .35: -.408 over all k, -.382 for k >= 30."""
    pool = counts(0.0, 1, prompts=4000)
    whole = {law.name: law for law in fit_coverage(pool, N, resamples=25)}["power"]
    late = {law.name: law for law in fit_coverage(pool, N, ks=[30, 50, 70, 100], resamples=0)}["power"]
    assert whole.parameters["b"] < late.parameters["b"] < -ALPHA + 0.03
    low, high = whole.intervals["b"]
    assert low < whole.parameters["b"] < high < -ALPHA and (whole.k_low, whole.k_high) == (1, N)


def test_intervals_cover_the_truth_and_the_misfit_sees_a_wrong_law():
    laws = {law.name: law for law in fit_coverage(counts(0.0, 2), N, resamples=25)}
    for name, value in (("alpha", ALPHA), ("beta", BETA)):
        low, high = laws["beta"].intervals[name]
        assert low < value < high
    assert laws["beta"].misfit < 1
    half = np.array([0] * 1500 + [60] * 1500)  # half of the prompts for certain soon, the others never
    wrong = {law.name: law for law in fit_coverage(half, N, resamples=0)}
    assert wrong["power"].misfit > 3 > wrong["saturating beta"].misfit
    assert wrong["saturating beta"].parameters["p0"] == pytest.approx(0.5, abs=0.01)


def test_what_shows_no_law_is_refused():
    with pytest.raises(ValueError, match="three numbers of candidates"):
        fit_coverage(np.array([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="between 0 and 8"):
        fit_coverage(np.array([0, 9]), 8)
    with pytest.raises(ValueError, match="coverage is 0 or 1"):
        fit_coverage(np.zeros(20, dtype=int), 8)
