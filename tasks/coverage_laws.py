"""How coverage (pass@k) grows with k: three laws, fitted to the same counts and compared by one likelihood.

A pool has P prompts with n candidates each, c of which are right. The laws of the share of prompts that are covered:

    power            c(k) = exp(a k^b), a, b < 0, which always goes to 1
    beta             c(k) = 1 - E[(1 - p)^k] with p ~ Beta(alpha, beta), which goes to 1 as 1 - O(k^-alpha)
    saturating beta  the same for a share 1 - p0 of the prompts, and never for the rest: c(inf) = 1 - p0

A law that cannot saturate is no evidence that more candidates keep helping: look at the third one and at its p0.

**Comparison.** Take a prompt's candidates in a random order and note in which of the intervals (0, k_1], (k_1, k_2],
..., (k_m, inf) the first right one falls. Under a law the interval (k_i, k_{i+1}] has the probability c(k_{i+1}) -
c(k_i), so every increasing law has a likelihood. Its logarithm is averaged over all orders, exactly, by the unbiased
pass@k of the prompt. BIC is that likelihood's; only the step from the second law to the third is judged by the
likelihood of the counts themselves, which both have and which says more. Even so, with 800 prompts of 100 candidates a
share of 15 % that is never right is told apart from a small alpha only every other time: read the interval of p0 too.

Reference: Brown et al. 2024, "Large Language Monkeys: Scaling Inference Compute with Repeated Sampling" (the power
law); Chen et al. 2021 (pass@k). The beta laws are the beta-binomial of repeated trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.estimators import pass_at_k

NAMES = ("power", "beta", "saturating beta")


@dataclass(frozen=True)
class CoverageLaw:
    """A fitted law.

    Attributes:
        name: power, beta or saturating beta.
        parameters: by name: a and b, or alpha, beta and p0.
        intervals: 95 % intervals from resampled prompts, by name; empty without resamples.
        bic: smaller is better; comparable between the laws of one pool only.
        misfit: root mean square distance of the fitted from the measured coverage, in standard errors of the latter:
            about 1 or less where the law describes what was seen.
        k_low, k_high: range of the fit; outside it the law is an extrapolation.
    """

    name: str
    parameters: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    bic: float
    misfit: float
    k_low: int
    k_high: int

    def __call__(self, k: float) -> float:
        """Coverage at k candidates a prompt."""
        return float(_curve(self.name, tuple(self.parameters.values()), np.array([k], dtype=np.float64))[0])


def fit_coverage(
    correct: np.ndarray, n: int, ks: Sequence[int] | None = None, resamples: int = 100, seed: int = 0
) -> list[CoverageLaw]:
    """The three laws, the one with the smallest BIC first.

    The power law is a weighted regression of log(-log c) on log k with weights from the delta method, without points
    within one standard error of 0 or 1, as published. The beta laws are the maximum of the likelihood of all counts.

    Args:
        correct: number of right ones among the n candidates of each prompt, (P,) whole numbers; the candidates of a
            prompt are independent (no resampled or repelled ones).
        n: candidates of a prompt.
        ks: numbers of candidates at which curves are compared, rising, at most n; None doubles from 1 to n.
        resamples: draws of prompts for the intervals.
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 prompts or 3 different ks; or coverage that is 0 or 1 throughout, where no law shows.
    """
    counts = np.asarray(correct, dtype=np.int64)
    places = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n}) if ks is None else list(ks)
    if counts.ndim != 1 or len(counts) < 2 or len(set(places)) < 3:
        raise ValueError(
            f"a law of coverage needs two prompts and three numbers of candidates or more, got {counts.shape} and "
            f"{places}. Draw more candidates of each prompt."
        )
    table = np.stack([pass_at_k(np.arange(n + 1), n, k) for k in places], axis=1)  # (n + 1, ks): by count
    prompts = np.bincount(counts, minlength=n + 1).astype(np.float64)
    grid = np.array(places, dtype=np.float64)
    pass_at_k(counts, n, 1)  # refuses counts outside [0, n]

    found = {name: _fit(name, prompts, table, grid, n) for name in NAMES}
    generator = np.random.default_rng(seed)
    draws: dict[str, list[tuple[float, ...]]] = {name: [] for name in NAMES}
    for _ in range(resamples):
        drawn = generator.multinomial(len(counts), prompts / len(counts)).astype(np.float64)
        for name in NAMES:
            try:
                draws[name].append(_fit(name, drawn, table, grid, n, found[name]))
            except ValueError:  # a draw in which no prompt is right says nothing
                continue
    mean = prompts @ table / len(counts)
    errors = np.sqrt(np.maximum(prompts @ (table - mean) ** 2 / len(counts), 1e-300) / (len(counts) - 1))
    extra = _count_loss(found["saturating beta"], prompts, n) - _count_loss(found["beta"], prompts, n)
    laws = []
    for name in NAMES:
        labels = ("a", "b") if name == "power" else ("alpha", "beta", "p0")
        ends = np.quantile(np.array(draws[name]), [0.025, 0.975], axis=0) if draws[name] else None
        intervals = {} if ends is None else {
            label: (float(ends[0, i]), float(ends[1, i])) for i, label in enumerate(labels[: len(found[name])])
        }  # fmt: skip
        curve = _curve(name, found[name], grid)
        judged = _curve("beta", found["beta"], grid) if name == "saturating beta" else curve
        bic = -2 * _log_likelihood(judged, prompts @ table, len(counts)) + len(found[name]) * math.log(len(counts))
        bic += 2 * extra if name == "saturating beta" else 0.0
        misfit = float(np.sqrt((((curve - mean) / errors) ** 2).mean()))
        named = dict(zip(labels, found[name], strict=False))
        laws.append(CoverageLaw(name, named, intervals, bic, misfit, int(grid[0]), int(grid[-1])))
    return sorted(laws, key=lambda law: law.bic)


def _curve(name: str, values: tuple[float, ...], k: np.ndarray) -> np.ndarray:
    """Coverage at every k."""
    if name == "power":
        return np.exp(values[0] * k ** values[1])
    from scipy.special import gammaln

    alpha, beta, *rest = values
    missed = np.exp(gammaln(beta + k) - gammaln(beta) + gammaln(alpha + beta) - gammaln(alpha + beta + k))
    return (1.0 - (rest[0] if rest else 0.0)) * (1.0 - missed)


def _log_likelihood(curve: np.ndarray, covered: np.ndarray, count: int) -> float:
    """Of the interval that holds the first right candidate, averaged over orders; ``covered`` sums over prompts."""
    expected = np.diff(np.concatenate([[0.0], curve, [1.0]]))
    seen = np.diff(np.concatenate([[0.0], covered, [float(count)]]))
    return float(seen @ np.log(np.maximum(expected, 1e-300)))


def _fit(
    name: str, prompts: np.ndarray, table: np.ndarray, grid: np.ndarray, n: int, start: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """Parameters for so many prompts of every count, (n + 1,)."""
    if name == "power":
        return _fit_power(prompts, table, grid)
    if not prompts[1:].sum() or not prompts[:-1].sum():
        raise ValueError("coverage is 0 or 1 for every number of candidates: no law shows. Use another threshold.")
    return _fit_beta(prompts, n, name == "saturating beta", start)


def _fit_power(prompts: np.ndarray, table: np.ndarray, grid: np.ndarray) -> tuple[float, float]:
    total = prompts.sum()
    c = prompts @ table / total
    error = np.sqrt(prompts @ (table - c) ** 2 / total / (total - 1))
    used = (c > np.maximum(error, 1e-12)) & (c < 1 - np.maximum(error, 1e-12))
    if used.sum() < 2:
        raise ValueError(
            "coverage is 0 or 1 for nearly every number of candidates: no law shows. Use another threshold."
        )
    c, error, x = c[used], error[used], np.log(grid[used])
    weights = (c * np.log(c) / np.maximum(error, 1e-12)) ** 2  # 1 / Var log(-log c), by the delta method
    y = np.log(-np.log(c))
    centre = weights @ x / weights.sum()
    slope = float(weights @ ((x - centre) * y) / (weights @ (x - centre) ** 2))
    return -math.exp(float(weights @ y / weights.sum()) - slope * centre), slope


def _count_loss(values: tuple[float, ...], prompts: np.ndarray, n: int) -> float:
    """Minus the log-likelihood of the counts under a beta law, up to the binomial coefficients."""
    from scipy.special import betaln

    (alpha, beta), p0, c = values[:2], (values[2] if len(values) > 2 else 0.0), np.flatnonzero(prompts)
    log_p = math.log1p(-p0) + betaln(alpha + c, beta + n - c) - betaln(alpha, beta)
    if p0:
        log_p = np.where(c == 0, np.logaddexp(math.log(p0), log_p), log_p)
    return -float(prompts[c] @ log_p)


def _fit_beta(prompts: np.ndarray, n: int, saturates: bool, start: tuple[float, ...] | None) -> tuple[float, ...]:
    """Maximum likelihood of the counts, over log alpha, log beta and logit p0."""
    from scipy.optimize import minimize
    from scipy.special import expit, logit

    def values(z: np.ndarray) -> tuple[float, ...]:
        alpha, beta = np.exp(np.clip(z[:2], -12, 12))
        return (float(alpha), float(beta), *(float(expit(np.clip(w, -20, 20))) for w in z[2:]))

    if start is None:
        share = float(np.clip(prompts @ np.arange(n + 1) / prompts.sum() / n, 1e-4, 1 - 1e-4))
        begun = [[math.log(size * share), math.log(size * (1 - share))] for size in (0.5, 5.0)]
        begun = [[*z, w] for z in begun for w in (-3.0, 0.0)] if saturates else begun
    else:
        rest = (float(logit(np.clip(p0, 1e-6, 1 - 1e-6))) for p0 in start[2:])
        begun = [[math.log(start[0]), math.log(start[1]), *rest]]
    options = {"xatol": 1e-3, "fatol": 1e-5}
    tries = [
        minimize(lambda z: _count_loss(values(z), prompts, n), z, method="Nelder-Mead", options=options) for z in begun
    ]
    return values(min(tries, key=lambda found: found.fun).x)
