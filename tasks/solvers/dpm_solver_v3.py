"""DPM-Solver-v3: an exponential integrator in the coordinates that suit a model best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.coefficients import derivative_weights
from tasks.processes import lam_range, transfer
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

_POINTS = 129  # of one step's quadrature


@solvers.register("dpm_solver_v3")
@dataclass(frozen=True)
class DPMSolverV3:
    """DPM-Solver-v3: multistep with empirical model statistics l, s, b, one number a dimension and log-SNR.

    With ``f = (sigma eps - l x) / alpha``, whose derivative along the trajectory is closest to ``s f + b``, and g the
    same with that linear part integrated out, ``x_t = (alpha_t / alpha_s) e^{-L} x_s - alpha_t e^{-L} [ E0 g_s + C +
    sum_k E_k g^(k) ]``: the integrals of l, s and b between the times are exact up to quadrature, and only what is left
    is expanded.

    Args:
        max_order: order of the multistep expansion; 3 without guidance, 2 with.
        corrector: make each step again with the output at its end (free); for up to 8 steps, or with guidance.
        pseudo: estimate the derivatives by nested divided differences, steadier at 5 evaluations, of order 2.
        num_levels: log-SNR levels M at which the statistics are taken.
        num_data: noised data K of each level.
        statistics: model calibrates them; data is l=1, s=b=0 (data prediction); noise is l=0, s=-1, b=0 (noise
            prediction).
        artifact: file with statistics made before.

    Reference: Zheng et al. 2023, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", eq.
    8-18 and appendix D. They use M up to 1200 and K up to 4096.
    Cost and order: one evaluation a step; of order ``max_order``, one more with the corrector. The calibration costs
    about 6 M K evaluations, once for a model and guidance.
    Identities: statistics=data without corrector is the multistep data-prediction integrator (``unified`` with
        dpmpp_3m).
    """

    max_order: int = 3
    corrector: bool = True
    pseudo: bool = False
    num_levels: int = 120
    num_data: int = 512
    statistics: str = "model"
    artifact: str = ""

    process = "gaussian"
    stochastic = False
    calibrated_on: ClassVar[tuple[str, ...]] = ("guidance", "labels", "seed", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        allowed = ["model", "data", "noise"]
        if self.statistics not in allowed:
            raise unknown("statistics", self.statistics, allowed, "Allowed")
        if not 1 <= self.max_order <= 3 or self.num_levels < 8 or self.num_data < 2:
            raise ValueError(
                "dpm_solver_v3 needs max_order from 1 to 3, num_levels >= 8 and num_data >= 2, got "
                f"{self.max_order}, {self.num_levels} and {self.num_data}."
            )

    @property
    def is_calibrated_here(self) -> bool:
        """The two trivial statistics need no look at the model."""
        return self.statistics == "model"

    @property
    def order(self) -> int:
        """The multistep order, one more with the corrector; nested differences are of order 2."""
        full = self.max_order + self.corrector
        return min(full, 2) if self.pseudo else full

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {"num_levels": self.num_levels, "num_data": self.num_data}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """``lam`` (M,) and ``l``, ``s``, ``b``, each (M, D) float64.

        Derivatives of the network are central differences: along Rademacher vectors for the diagonal of its Jacobian,
        along the trajectory for the total derivative.
        """
        process = bench.process
        first, last = lam_range(process)
        lams = np.linspace(first, last, self.num_levels)
        x0, cond = bench.data(self.num_data)
        noise = bench.noise(self.num_data)
        shape = tuple(x0.shape[1:])
        # The same noise and probes at every level: the statistics are then smooth in log-SNR, which the order needs.
        z = noise.normal(shape, purpose="ems")
        v = torch.sign(noise.normal(shape, purpose="ems-probe"))
        diagonal, eps_all, total, states = [], [], [], []
        size = bench.recipe.batch_size
        for lam in lams:
            t = process.time(float(lam))
            alpha, sigma = process.alpha(t), process.sigma(t)
            x = alpha * x0 + sigma * z
            parts = [slice(i, i + size) for i in range(0, len(x), size)]
            found = [
                _derivatives(bench.model, process, x[p], v[p], t, None if cond is None else cond[p]) for p in parts
            ]
            eps, jacobian, along = (torch.cat([f[k] for f in found]).flatten(1).double() for k in range(3))
            diagonal.append(sigma * (v.flatten(1).double() * jacobian).mean(0).numpy())
            eps_all.append(eps.numpy())
            total.append(along.numpy())
            states.append(x.flatten(1).double().numpy())
        l = np.stack(diagonal)  # noqa: E741
        slope = np.gradient(l, lams, axis=0)
        kernel = np.ones(5) / 5
        padded = np.pad(slope, ((2, 2), (0, 0)), mode="edge")
        slope = np.stack([np.convolve(padded[:, d], kernel, mode="valid") for d in range(l.shape[1])], axis=1)
        s, b = np.zeros_like(l), np.zeros_like(l)
        for m, lam in enumerate(lams):
            t = process.time(float(lam))
            alpha = process.alpha(t)
            f = (process.sigma(t) * eps_all[m] - l[m] * states[m]) / alpha
            df = math.exp(-lam) * ((l[m] - 1.0) * eps_all[m] + total[m]) - slope[m] * states[m] / alpha
            mean_f, mean_df = f.mean(0), df.mean(0)
            variance = ((f - mean_f) ** 2).mean(0)
            covariance = ((f - mean_f) * (df - mean_df)).mean(0)
            # Where f is constant (Gaussian data) its share of the derivative is not defined: all of it is b.
            s[m] = np.where(variance > 1e-8, covariance / np.maximum(variance, 1e-8), 0.0)
            b[m] = mean_df - s[m] * mean_f
        return {"lam": lams, "l": l, "s": s, "b": b}

    @cached_property
    def _trivial(self) -> dict[str, np.ndarray]:
        one, zero = np.ones((2, 1)), np.zeros((2, 1))
        lam = np.array([-1.0, 1.0])
        if self.statistics == "data":
            return {"lam": lam, "l": one, "s": zero, "b": zero}
        return {"lam": lam, "l": zero, "s": -one, "b": zero}

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """The weights of every step, and no history."""
        statistics = getattr(self, "calibrated", None) or self._trivial
        return {"plan": _Plan(self, statistics, process, times), "group": 0, "history": (), "base": None}

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        memory, plan = state.memory, state.memory["plan"]
        i, x = memory["group"], state.x
        x0_hat = model.denoise(x, t)
        if not math.isfinite(plan.lams[i]):  # from alpha = 0 the first step is the one that all share
            moved = transfer(model.process, x, x0_hat, t, s)
            return State(moved, x0_hat, memory | {"group": i + 1}, state.step + 1)
        f = plan.f(i, x, x0_hat)
        if memory["base"] is not None and (correction := plan.corrections[i - 1]) is not None:
            x = plan.apply(correction, memory["base"], (f, *memory["history"]))
        history = (f, *memory["history"])[: self.max_order]
        if math.isfinite(plan.lams[i + 1]):
            moved = plan.apply(plan.updates[i], x, history)
        else:
            # At the data: the clean prediction, of the corrected state with sigma eps - l x held fixed.
            moved = plan.clean(i, x, f)
        memory = memory | {"group": i + 1, "history": history, "base": x}
        return State(moved, x0_hat, memory, state.step + 1)


def _derivatives(
    model: Any, process: Any, x: Tensor, v: Tensor, t: float, cond: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The predicted noise, its derivative along v, and along the trajectory in log-SNR; each (B, *shape)."""

    def eps_at(state: Tensor, time: float) -> Tensor:
        return (state - process.alpha(time) * model.denoise(state, time, cond)) / process.sigma(time)

    eps = eps_at(x, t)
    # Networks compute in float32 whatever the state's dtype is; narrow differences would drown in its rounding.
    is_exact = x.dtype == torch.float64 and not hasattr(model, "network")
    width = 1e-4 if is_exact else 1e-2
    jacobian = (eps_at(x + width * v, t) - eps_at(x - width * v, t)) / (2 * width)
    lam, gap = process.lam(t), 1e-3 if is_exact else 2e-2
    ends = []
    for sign in (1.0, -1.0):
        # The trajectory to first order: with the noise held fixed, x / alpha moves with sigma / alpha.
        other = min(process.time(lam + sign * gap), 1.0)
        moved = process.alpha(other) * (x / process.alpha(t))
        moved = moved + (process.sigma(other) - process.alpha(other) * process.sigma(t) / process.alpha(t)) * eps
        ends.append((eps_at(moved, other), process.lam(other)))
    return eps, jacobian, (ends[0][0] - ends[1][0]) / (ends[0][1] - ends[1][1])


class _Plan:
    """All numbers of a run: for every step a factor, a constant and the weights of f, one a dimension."""

    def __init__(self, spec: DPMSolverV3, statistics: dict[str, np.ndarray], process: Any, times: tuple[float, ...]):
        self.process, self.times = process, times
        self.alphas = [process.alpha(t) for t in times]
        self.sigmas = [process.sigma(t) for t in times]
        self.lams = [process.lam(t) for t in times]
        self.statistics = statistics
        self._curves: dict[str, Any] = {}
        self.l_at = [self._at("l", lam) if math.isfinite(lam) else None for lam in self.lams]
        self.updates: list[Any] = []
        self.corrections: list[Any] = []
        usable = [i for i in range(len(times) - 1) if math.isfinite(self.lams[i])]
        for i in range(len(times) - 1):
            if i not in usable or not math.isfinite(self.lams[i + 1]):
                self.updates.append(None)
                self.corrections.append(None)
                continue
            behind = [j for j in usable if j < i][::-1][: spec.max_order - 1]
            self.updates.append(self._weights(i, behind, None, spec.pseudo))
            self.corrections.append(self._weights(i, behind, i + 1, spec.pseudo) if spec.corrector else None)

    def reindex(self, index: Tensor) -> _Plan:
        """The same for other particles."""
        return self

    def _at(self, name: str, lam: Any) -> np.ndarray:
        if name not in self._curves:
            from scipy.interpolate import CubicSpline

            self._curves[name] = CubicSpline(self.statistics["lam"], self.statistics[name], axis=0)
        # Constant beyond the levels that were looked at.
        return self._curves[name](np.clip(lam, self.statistics["lam"][0], self.statistics["lam"][-1]))

    def _cumulative(self, i: int, lam: float) -> tuple[np.ndarray, ...]:
        """From lam_i to lam: nodes, and the integrals of l, s and b e^{-S}, each (points, D)."""
        nodes = np.linspace(self.lams[i], lam, _POINTS)
        h = np.diff(nodes)[:, None]

        def integral(values: np.ndarray) -> np.ndarray:
            steps = 0.5 * (values[1:] + values[:-1]) * h
            return np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(steps, axis=0)])

        big_l, big_s = integral(self._at("l", nodes)), integral(self._at("s", nodes))
        return nodes, big_l, big_s, integral(self._at("b", nodes) * np.exp(-big_s))

    def _weights(self, i: int, behind: list[int], end: int | None, pseudo: bool) -> tuple[Any, ...]:
        nodes, big_l, big_s, big_b = self._cumulative(i, self.lams[i + 1])
        kernel = np.exp(big_l + big_s)

        def integral(values: np.ndarray) -> np.ndarray:
            # Simpson's rule on an odd number of points.
            h = (nodes[-1] - nodes[0]) / (_POINTS - 1)
            return h / 3 * (values[0] + values[-1] + 4 * values[1:-1:2].sum(0) + 2 * values[2:-1:2].sum(0))

        points = [*behind, *([] if end is None else [end])]
        # g_j = e^{-S_ij} f_j - B_ij for every point, referred to the step's start.
        gain, shift = [np.ones(kernel.shape[1])], [np.zeros(kernel.shape[1])]
        for j in points:
            _, _, s_j, b_j = self._cumulative(i, self.lams[j])
            gain.append(np.exp(-s_j[-1]))
            shift.append(b_j[-1])
        places = [self.lams[j] - self.lams[i] for j in points]
        order = len(points) + 1
        moments = [integral(kernel * ((nodes - nodes[0]) ** d / math.factorial(d))[:, None]) for d in range(order)]
        on_g = [moments[0].copy(), *(np.zeros_like(moments[0]) for _ in points)]
        for d in range(1, order):
            weights = _divided(places, d) if pseudo else derivative_weights(places, d, self.lams[i + 1] - self.lams[i])
            for k, a in enumerate(weights, 1):
                on_g[k] += moments[d] * a
                on_g[0] -= moments[d] * a
        factor = self.alphas[i + 1] * np.exp(-big_l[-1])
        constant = -factor * (integral(kernel * big_b) - sum(w * b for w, b in zip(on_g, shift, strict=True)))
        on_f = [-factor * w * g for w, g in zip(on_g, gain, strict=True)]
        carry = self.alphas[i + 1] / self.alphas[i] * np.exp(-big_l[-1])
        # In a correction the newest point, the end of the step, comes first in the history that is given.
        ordered = on_f if end is None else [on_f[-1], *on_f[:-1]]
        return carry, constant, ordered

    def f(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """``(sigma eps - l x) / alpha = ((1 - l) x - alpha x0) / alpha``."""
        return ((1.0 - _like(self.l_at[i], x)) * x) / self.alphas[i] - x0

    def clean(self, i: int, x: Tensor, f: Tensor) -> Tensor:
        """The clean prediction of state x with f."""
        return ((1.0 - _like(self.l_at[i], x)) * x) / self.alphas[i] - f

    def apply(self, weights: tuple[Any, ...], x: Tensor, history: tuple[Tensor, ...]) -> Tensor:
        """``carry x + constant + sum_j w_j f_j``."""
        carry, constant, on_f = weights
        moved = _like(carry, x) * x + _like(constant, x)
        for w, f in zip(on_f, history, strict=False):
            moved = moved + _like(w, x) * f
        return moved


def _divided(places: list[float], d: int) -> list[float]:
    """Weights of the d-th nested divided difference times d!: lower accuracy than the full system, steadier.

    Only the d nearest points enter, so each derivative is estimated to first order.
    """
    return [*derivative_weights(places[:d], d), *[0.0] * (len(places) - d)] if len(places) >= d else [0.0] * len(places)


def _like(values: Any, x: Tensor) -> Tensor:
    """Numbers of dimensions (D,), or one number (1,), shaped to multiply states."""
    tensor = torch.as_tensor(values, dtype=x.dtype, device=x.device)
    return tensor.reshape(1, *[1] * (x.dim() - 1)) if tensor.numel() == 1 else tensor.reshape(1, *x.shape[1:])
