"""The weights of one step of a schedule, in float64.

Every prediction makes the probability-flow equation linear in another way (k: how stochastic, c = 1 + k^2):

* ``x0``:  x_s = (sigma_s / sigma_b) e^{-k^2 h} x_b + alpha_s c int e^{-c (lam_s - lam)} x0 dlam + sigma_s sqrt(1 -
    e^{-2 k^2 h}) z
* ``eps``: x_s = (alpha_s / alpha_b) x_b - sigma_s c int e^{lam_s - lam} eps dlam + k sigma_s sqrt(e^{2h} - 1) z
* ``v``:   x_s = x_b + int v du, where u is a flow's time or a VP process's angle

with h = lam_s - lam_b. The prediction is replaced by its Taylor polynomial in the chosen variable; the integrals of its
terms are closed forms for the first and Gauss-Legendre quadrature for the rest (the recursion for phi functions loses
digits where h is small, quadrature does not).

Reference: Lu et al. 2022 (DPM-Solver, DPM-Solver++); Zhang and Chen 2023 (DEIS); Gonzalez et al. 2024 (SEEDS) and Xue
et al. 2024 (SA-Solver) for the stochastic forms; Zhao et al. 2023 (UniPC) for B(h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.processes import VP
from tasks.schedule import Step

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


@dataclass(frozen=True)
class Update:
    """``x_s = carry x_b + sum_j weights[j] f_j + std z``.

    Attributes:
        carry: factor on the base state.
        weights: (offset from the base, weight) of the evaluations that enter; offset 0 is the base's own. The end of
            the step itself, in a corrector, has the offset ``END``.
        std: standard deviation of the fresh noise.
        total: the sum of the weights: the factor on a constant prediction.
    """

    carry: float
    weights: tuple[tuple[int, float], ...]
    std: float
    total: float


END = 10**6


def angle(process: Any, t: float) -> float:
    """The coordinate along which the velocity is the slope: a flow's time, a VP process's angle.

    Raises:
        ValueError: the process has no such form.
    """
    if process.kind_of_path == "linear":
        return t
    if isinstance(process, VP):
        return math.atan2(process.sigma(t), process.alpha(t))
    raise ValueError(f"prediction v needs a VP process or a flow, not {type(process).__name__}. Use x0 or eps.")


def rho(process: Any, t: float) -> float:
    """sigma / alpha at t; infinite where alpha is 0."""
    alpha = process.alpha(t)
    return process.sigma(t) / alpha if alpha > 0 else math.inf


def _place(process: Any, variable: str, t: float, index: int) -> float:
    if variable == "lam":
        return process.lam(t)
    if variable == "rho":
        return rho(process, t)
    if variable == "t":
        return t
    if variable == "u":
        return angle(process, t)
    return float(index)


def is_usable(process: Any, variable: str, t: float) -> bool:
    """Whether an evaluation at t can be a point of an expansion in this variable."""
    return math.isfinite(_place(process, variable, t, 0))


def highest_order(process: Any, step: Step, t: float, s: float) -> int:
    """1 where the step starts or ends at a place that the form of the step cannot expand at; else no limit (99)."""
    if step.prediction == "v":
        return 99
    if process.alpha(t) == 0:
        return 1
    if process.sigma(s) > 0:
        return 99
    # Towards sigma = 0 an expansion in log-SNR has no end. In the others the noise form stays finite, and the data form
    # becomes the prediction extrapolated to the end; with fresh noise only the latter does.
    finite = step.variable in ("rho", "t", "index")
    return 99 if finite and (step.prediction == "x0" or step.kappa == 0) else 1


def update(process: Any, step: Step, times: dict[int, float], s: float, correcting: bool = False) -> Update:
    """The weights of a step.

    Args:
        process: the noising process.
        step: the record.
        times: offset from the base -> time of that evaluation; 0 is the base.
        s: where the step ends.
        correcting: the update that a corrector makes, with the evaluation at the end as one more point.
    """
    if step.weights:
        if step.prediction == "v":
            angle(process, times[0])  # refuses a process that has no such form
        carry, *others = step.weights
        return Update(carry, tuple(enumerate(others)), 0.0, sum(others))
    t = times[0]
    limit = highest_order(process, step, t, s)
    if limit == 1:
        return _first_order(process, step, t, s)
    h = process.lam(s) - process.lam(t) if step.prediction != "v" else 0.0
    groups = [tuple(group) for group in step.stencil]
    spots = dict(times)
    if correcting:
        spots[END] = s
        full = tuple(sorted({o for group in groups for o in group})) + (END,)
        groups = [full] * len(full)
    order = len(groups) + 1
    origin = _place(process, step.variable, t, 0)
    if step.prediction == "x0" and process.sigma(s) == 0:
        # The kernel c e^{-c (lam_s - lam)} has all its weight at the end. Steps in their own number weigh evenly.
        carry, zeroth, std = 0.0, process.alpha(s), 0.0
        even, reach = step.variable == "index", _place(process, step.variable, s, step.start) - origin
        terms = [zeroth * reach**d / math.factorial(d + even) for d in range(order)]
    else:
        carry, zeroth, std, kernel = _form(process, step, t, s, h)
        terms = [zeroth, *(_moment(process, step, t, s, d, origin, zeroth, kernel) for d in range(1, order))]
    weights: dict[int, float] = {0: zeroth}
    span = _place(process, step.variable, s, step.start) - origin
    for d, group in enumerate(groups, 1):
        factor = 1.0 if correcting else (step.scale[d - 1] if d <= len(step.scale) else 1.0)
        term = terms[d]
        if step.relax != "none" and order == 2 and len(group) == 1:
            term = _relaxed(step, h) * zeroth / step_zero(step, h)
        places = [_place(process, step.variable, spots[o], step.start if o == END else o) - origin for o in group]
        if not all(map(math.isfinite, places)) or len({*places, 0.0}) <= len(places):
            raise ValueError(
                f"a step in {step.variable} from t={t:.6g} needs evaluations at different, finite places, got offsets "
                f"{[round(place, 6) for place in places]}. Lower its order, or use another variable."
            )
        for offset, a in zip(group, derivative_weights(places, d, span), strict=True):
            weights[offset] = weights.get(offset, 0.0) + factor * term * a
            weights[0] -= factor * term * a
    return Update(carry, tuple(weights.items()), std, zeroth)


def step_zero(step: Step, h: float) -> float:
    """The zeroth term per unit of the form's own factor: 1 - e^{-c h} of the data form, e^h - 1 of the noise form."""
    c = 1.0 + step.kappa**2
    return -math.expm1(-c * h) if step.prediction == "x0" else math.expm1(h)


def _relaxed(step: Step, h: float) -> float:
    """The relaxed first-derivative term, in the same units: h times half of B(h)."""
    c = 1.0 + step.kappa**2
    if step.relax == "bh2":
        return 0.5 * h * step_zero(step, h)
    return 0.5 * h * h * (c if step.prediction == "x0" else 1.0)


def relaxation(process: Any, step: Step, t: float, s: float) -> float:
    """The factor by which ``relax`` changes the first derivative's term of a step from t to s; 1 where it is none."""
    if step.relax == "none" or step.order != 2 or highest_order(process, step, t, s) == 1:
        return 1.0
    h = process.lam(s) - process.lam(t)
    zeroth = _form(process, step, t, s, h)[1]
    exact = _moment(process, step, t, s, 1, process.lam(t), zeroth, _form(process, step, t, s, h)[3])
    return _relaxed(step, h) * zeroth / step_zero(step, h) / exact


def _first_order(process: Any, step: Step, t: float, s: float) -> Update:
    """One evaluation, finite at both ends: the data form at alpha = 0, and the clean prediction itself at sigma = 0."""
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    if step.prediction == "eps":
        assert alpha_t > 0 and sigma_s == 0, "a plan steps in the data form where alpha is 0"
        return Update(alpha_s / alpha_t, ((0, -alpha_s * sigma_t / alpha_t),), 0.0, -alpha_s * sigma_t / alpha_t)
    fade = 1.0
    if step.kappa > 0 and sigma_s > 0:
        h = process.lam(s) - process.lam(t)
        fade = math.exp(-(step.kappa**2) * h)
    elif step.kappa > 0:
        fade = 0.0
    carry = sigma_s / sigma_t * fade
    zeroth = alpha_s - alpha_t * carry
    if step.kappa > 0 and sigma_s > 0 and alpha_t > 0:
        zeroth = -alpha_s * math.expm1(-(1.0 + step.kappa**2) * (process.lam(s) - process.lam(t)))
    std = sigma_s * math.sqrt(max(1.0 - fade**2, 0.0))
    return Update(carry, ((0, zeroth),), std, zeroth)


def _form(process: Any, step: Step, t: float, s: float, h: float) -> tuple[float, float, float, Callable[..., Any]]:
    """Factor on the base, weight of a constant prediction, noise, and the kernel over the quadrature coordinate."""
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    c, k2 = 1.0 + step.kappa**2, step.kappa**2
    if step.prediction == "x0":
        carry = sigma_s / process.sigma(t) * math.exp(-k2 * h)
        std = sigma_s * math.sqrt(-math.expm1(-2 * k2 * h))
        lam_s = process.lam(s)
        return carry, -alpha_s * math.expm1(-c * h), std, lambda lam: alpha_s * c * np.exp(-c * (lam_s - lam))
    if step.prediction == "eps":
        carry, span = alpha_s / process.alpha(t), rho(process, s) - rho(process, t)
        std = math.sqrt(k2) * alpha_s * math.sqrt(max(rho(process, t) ** 2 - rho(process, s) ** 2, 0.0))
        return carry, c * alpha_s * span, std, lambda r: np.full_like(r, c * alpha_s)
    return 1.0, angle(process, s) - angle(process, t), 0.0, lambda u: np.ones_like(u)


def _moment(
    process: Any, step: Step, t: float, s: float, d: int, origin: float, zeroth: float, kernel: Callable[..., Any]
) -> float:
    """The integral of (variable - origin)^d / d! against the kernel of the form."""
    if step.variable == "index":
        return zeroth * step.start**d / math.factorial(d + 1)
    if step.prediction == "v":
        low, high, to_time = angle(process, t), angle(process, s), None
    elif step.prediction == "eps" and step.variable != "lam":
        low, high, to_time = rho(process, t), rho(process, s), lambda r: process.time(-math.log(r))
    else:
        low, high, to_time = process.lam(t), process.lam(s), process.time
        if step.prediction == "eps":  # d(rho) = -e^{-lam} d(lam)
            scale = (1.0 + step.kappa**2) * process.alpha(s)
            kernel = lambda lam: -scale * np.exp(-lam)  # noqa: E731
    middle, half = (low + high) / 2, (high - low) / 2
    nodes = middle + half * _NODES
    if step.variable == "t" and step.prediction != "v":
        assert to_time is not None
        places = np.array([to_time(float(node)) for node in nodes])
    elif step.variable == "rho" and step.prediction == "x0":
        places = np.exp(-nodes)
    elif step.variable == "t" and process.kind_of_path != "linear":
        places = np.array([process.time(-math.log(math.tan(float(node)))) for node in nodes])
    else:
        places = nodes
    values = kernel(nodes) * (places - origin) ** d / math.factorial(d)
    return float(half * (values @ _WEIGHTS))


def derivative_weights(places: Sequence[float], d: int, span: float = 1.0) -> list[float]:
    """Weights a_j with ``f^(d)(0) ~ sum_j a_j (f(places[j]) - f(0))``, exact for polynomials of degree len(places).

    Solved in units of ``span``, so that the Vandermonde matrix is well conditioned whatever the step's size.
    """
    count = len(places)
    scaled = np.asarray(places, dtype=np.float64) / span
    matrix = np.array([scaled**i / math.factorial(i) for i in range(1, count + 1)])
    target = np.zeros(count)
    target[d - 1] = 1.0
    return [float(a) / span**d for a in np.linalg.solve(matrix, target)]
