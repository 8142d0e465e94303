"""What more samples buy, estimated from one pool: pass@k, best of k, scaling laws and the best split of a budget.

A pool holds N independent candidates of each of P prompts (here: rows of a study). Intervals come from the prompts,
which are the independent units; candidates that were resampled or repelled are not independent, and never a pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.intervals import Z95


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """Unbiased probability that one of k candidates is right, ``1 - C(n - c, k) / C(n, k)``.

    Args:
        correct: number c of right ones among the n candidates of each prompt, (P,) whole numbers.
        n: candidates of a prompt.
        k: at most n.

    Returns:
        (P,) float64; average over prompts.

    Raises:
        ValueError: k outside [1, n], or counts outside [0, n].

    Reference: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.
    """
    _check_k(n, k)
    c = np.asarray(correct, dtype=np.float64)
    if ((c < 0) | (c > n)).any():
        raise ValueError(f"counts of right candidates must lie between 0 and {n}, got {c.min():g} to {c.max():g}.")
    missed = np.ones_like(c)
    for j in range(k):
        missed *= np.clip(n - c - j, 0.0, None) / (n - j)
    return 1.0 - missed


def best_of_k(values: np.ndarray, k: int, selected_by: np.ndarray | None = None) -> np.ndarray:
    """Unbiased expectation of what best-of-k returns, from all subsets of k of the N candidates at once.

    ``E = sum_{i >= k} w_i e_(i)`` over candidates in ascending order of the selecting score, with ``w_i = C(i - 1,
    k - 1) / C(N, k)``. Where scores are tied, the values of the tied ones are averaged.

    Args:
        values: (P, N) floats, what is reported.
        k: between 1 and N.
        selected_by: (P, N), the score that picks; None picks by the values themselves.

    Returns:
        (P,) float64.

    Raises:
        ValueError: k outside [1, N], unlike shapes, or numbers that are not finite.
    """
    e = np.asarray(values, dtype=np.float64)
    score = e if selected_by is None else np.asarray(selected_by, dtype=np.float64)
    if e.ndim != 2 or e.shape != score.shape:
        raise ValueError(f"values and scores must both be (prompts, candidates), got {e.shape} and {score.shape}.")
    if not (np.isfinite(e).all() and np.isfinite(score).all()):
        raise ValueError("best_of_k needs finite values; a pool of an adaptive strategy has holes and is none.")
    n = e.shape[1]
    _check_k(n, k)
    order = np.argsort(score, axis=1, kind="stable")
    e, score = np.take_along_axis(e, order, 1), np.take_along_axis(score, order, 1)
    weights = np.zeros(n)
    weights[-1] = k / n
    for i in range(n - 1, k - 1, -1):  # ranks from 1: w_{i} = w_{i+1} (i + 1 - k) / i
        weights[i - 1] = weights[i] * (i + 1 - k) / i
    if selected_by is not None:
        for row in np.flatnonzero((np.diff(score, axis=1) == 0).any(axis=1)):
            _, group = np.unique(score[row], return_inverse=True)
            e[row] = (np.bincount(group, e[row]) / np.bincount(group))[group]
    return e @ weights


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the {n} candidates of a prompt, got {k}. Draw more candidates.")


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and 95 % interval."""

    value: float
    error: float
    low: float
    high: float


def jackknife(per_prompt: np.ndarray) -> Estimate:
    """Mean over prompts with the jackknife's standard error, ``s / sqrt(P)``, and the normal interval.

    Raises:
        ValueError: fewer than two prompts.
    """
    x = _prompts(per_prompt)
    value, error = float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))
    return Estimate(value, error, value - Z95 * error, value + Z95 * error)


def _prompts(values: np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"an interval needs one value for each of two prompts or more, got shape {x.shape}.")
    return x


@dataclass(frozen=True)
class ScalingFit:
    """``y = limit - gain x^-power``, with what it was fitted on.

    Attributes:
        limit, gain, power: of the law; ``limit`` is where it goes, not where it has been seen to go.
        intervals: name of a parameter -> 95 % interval from resampled prompts; empty without any.
        misfit: root mean square distance of the law from the mean values, in standard errors of these: about 1 or less
            where it describes what was seen; NaN where there is one value an amount.
        x_low, x_high: range of the fit; outside it the law is an extrapolation.
    """

    limit: float
    gain: float
    power: float
    intervals: Mapping[str, tuple[float, float]]
    misfit: float
    x_low: float
    x_high: float

    def __call__(self, x: float) -> float:
        """The law at x."""
        return self.limit - self.gain * float(x) ** -self.power


POWERS = np.geomspace(0.02, 4.0, 400)


def fit_scaling(x: Sequence[float], y: np.ndarray, resamples: int = 200, seed: int = 0) -> ScalingFit:
    """Power law with an offset by least squares: linear in limit and gain, a fine grid over the power.

    Args:
        x: amounts of compute, (C,), at least 4 different ones above 0.
        y: (P, C) values of each prompt, or (C,) means; intervals need the first.
        resamples: draws of prompts for the intervals.
        seed: of the draws.

    Raises:
        ValueError: too few amounts, or shapes that do not fit.

    Reference: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", eq. 2 (the form).
    """
    amounts, table = np.asarray(x, dtype=np.float64), np.atleast_2d(np.asarray(y, dtype=np.float64))
    if len(set(amounts.tolist())) < 4 or (amounts <= 0).any():
        raise ValueError(f"a law of three parameters needs four amounts above 0 or more, got {list(x)}.")
    if table.ndim != 2 or table.shape[1] != len(amounts):
        raise ValueError(f"values must be (prompts, {len(amounts)} amounts), got {table.shape}.")
    bases = amounts[None] ** -POWERS[:, None]  # (powers, amounts)
    bases_c = bases - bases.mean(axis=1, keepdims=True)
    norms = (bases_c**2).sum(axis=1)

    def law(mean: np.ndarray) -> tuple[float, float, float]:
        slopes = bases_c @ (mean - mean.mean()) / norms
        residuals = ((mean - mean.mean() - slopes[:, None] * bases_c) ** 2).sum(axis=1)
        best = int(residuals.argmin())
        return float(mean.mean() - slopes[best] * bases[best].mean()), float(-slopes[best]), float(POWERS[best])

    found, intervals = law(table.mean(axis=0)), {}
    if len(table) > 1 and resamples:
        generator = np.random.default_rng(seed)
        draws = [law(table[generator.integers(len(table), size=len(table))].mean(axis=0)) for _ in range(resamples)]
        ends = np.quantile(np.array(draws), [0.025, 0.975], axis=0)
        names = ("limit", "gain", "power")
        intervals = {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(names)}
    misfit = float("nan")
    if len(table) > 1:
        off = table.mean(axis=0) - (found[0] - found[1] * amounts ** -found[2])
        errors = table.std(axis=0, ddof=1) / np.sqrt(len(table))
        misfit = float(np.sqrt(np.mean((off / np.maximum(errors, 1e-300)) ** 2)))
    return ScalingFit(*found, intervals, misfit, float(amounts.min()), float(amounts.max()))


@dataclass(frozen=True)
class Split:
    """The best way to spend a budget.

    Attributes:
        name: of the arm (a number of steps, say).
        k: candidates that it can pay for.
        estimate: on the half of the prompts that did not choose it.
        votes: how often each arm won, over the repeated halvings.
    """

    name: str
    k: int
    estimate: Estimate
    votes: Mapping[str, int]


def best_split(
    pools: Mapping[str, np.ndarray], costs: Mapping[str, float], budget: float, halvings: int = 20, seed: int = 0
) -> Split:
    """Which arm's best-of-k is best where k is all that the budget pays for.

    Chosen on one half of the prompts and reported on the other, many times over, so that the winner's luck is no part
    of its value.

    Args:
        pools: arm -> (P, N) scores of its candidates; the same prompts in every arm.
        costs: arm -> what one candidate costs (evaluations, or any sum of evaluations, rewards and decoding).
        budget: what may be spent on a prompt.
        halvings: random halves; each gives two values.
        seed: of the halves.

    Raises:
        ValueError: no arm that the budget pays for once, or arms with different prompts.
    """
    affordable = {name: min(int(budget // costs[name]), pools[name].shape[1]) for name in pools}
    arms = [name for name, k in affordable.items() if k >= 1]
    if not arms:
        raise ValueError(f"a budget of {budget:g} pays for no candidate: the cheapest costs {min(costs.values()):g}.")
    table = np.stack([best_of_k(pools[name], affordable[name]) for name in arms])  # (arms, P)
    name, estimate, votes = choose(dict(zip(arms, table, strict=True)), halvings, seed)
    return Split(name, affordable[name], estimate, votes)


def choose(values: Mapping[str, np.ndarray], halvings: int = 20, seed: int = 0) -> tuple[str, Estimate, dict[str, int]]:
    """The arm with the largest mean, with a value that is free of the winner's luck.

    Args:
        values: arm -> one value for each prompt, (P,); the same prompts in every arm, 4 at least.
        halvings: random halves of the prompts; each half chooses once, and the other reports.
        seed: of the halves.

    Returns:
        the arm that most halves chose, what the choice is worth on prompts that did not make it, and how often each arm
        was chosen.

    Raises:
        ValueError: fewer than four prompts.
    """
    arms, table = list(values), np.stack(list(values.values()))
    if table.shape[1] < 4:
        raise ValueError(f"choosing and reporting on different prompts needs 4 of them, got {table.shape[1]}.")
    generator, votes = np.random.default_rng(seed), dict.fromkeys(arms, 0)
    total, seen = np.zeros(table.shape[1]), np.zeros(table.shape[1])
    for _ in range(halvings):
        order = generator.permutation(table.shape[1])
        half = len(order) // 2
        for choosing, reporting in ((order[:half], order[half:]), (order[half:], order[:half])):
            winner = int(table[:, choosing].mean(axis=1).argmax())
            votes[arms[winner]] += 1
            total[reporting] += table[winner, reporting]
            seen[reporting] += 1
    return max(votes, key=lambda arm: votes[arm]), jackknife(total / seen), votes
