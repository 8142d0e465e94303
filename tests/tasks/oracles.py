"""Exact answers for strategies: Gaussian mixtures in one dimension, their tilts, soft values and reverse kernels.

Formulas: a tilt by ``exp(-lam (x - c)^2 / (2 q))`` maps a component (w, m, v) to another one in closed form, so the
tilted law, its normaliser, and the soft value ``V(x, t) = log E[exp(lam r(x_0)) | x_t]`` are exact. So is the reverse
kernel p(x_s | x_t), a mixture: with it a test has no discretisation error at any number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.types import State

torch.set_num_threads(1)  # two on two busy cores make a step four times slower

FLOW, VP = "flow", "vp"


@dataclass(frozen=True)
class Mixture:
    """w, m, v of a mixture in one dimension, and its tilt (c, q, lam)."""

    w: tuple[float, ...]
    m: tuple[float, ...]
    v: tuple[float, ...]
    c: float
    q: float
    lam: float

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.array(self.w), np.array(self.m), np.array(self.v)

    def spec(self, process: str = FLOW) -> dict[str, Any]:
        """The ``gmm`` plug-in of this law."""
        return {
            "name": "gmm",
            "process": process,
            "weights": list(self.w),
            "means": [[m] for m in self.m],
            "covariances": [math.sqrt(v) for v in self.v],
        }

    def reward(self) -> dict[str, Any]:
        """The ``quadratic`` plug-in."""
        return {"name": "quadratic", "center": self.c, "q": self.q}

    def moments(self) -> tuple[float, float]:
        w, m, v = self.arrays()
        return mixture_moments(w, m, v)

    def tilted(self) -> tuple[float, float, float]:
        """Mean, variance and log Z of ``p e^{lam r}``."""
        w, m, v, log_z = tilt(*self.arrays(), self.c, self.q, self.lam)
        return *mixture_moments(w, m, v), float(log_z)

    def value(self, process: Any, x: Tensor, t: float) -> Tensor:
        """The exact soft value V(x, t) of states (N, 1), (N,)."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        if sigma == 0:
            return -self.lam * (x[:, 0].double() - self.c) ** 2 / (2 * self.q)
        w, m, v = (torch.from_numpy(a) for a in self.arrays())
        x = x.double()
        spread = alpha**2 * v + sigma**2
        weights = torch.softmax(torch.log(w) - 0.5 * (torch.log(spread) + (x - alpha * m) ** 2 / spread), dim=1)
        means = m + alpha * v / spread * (x - alpha * m)
        variances = v * sigma**2 / spread
        rho = self.lam / self.q
        logs = torch.log(weights) - 0.5 * torch.log1p(variances * rho)
        return torch.logsumexp(logs - 0.5 * (means - self.c) ** 2 / (variances + 1 / rho), dim=1)


class Denoiser:
    """The posterior mean of a mixture in one dimension; what the ``gmm`` plug-in answers, at a quarter of its cost."""

    shape = (1,)
    num_classes = 0

    def __init__(self, law: Mixture, process: Any) -> None:
        self.process = process
        self._log_w, self._m, self._v = (torch.from_numpy(a) for a in (np.log(law.w), *law.arrays()[1:]))

    def denoise(self, x: Tensor, t: float, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        spread = alpha**2 * self._v + sigma**2
        centred = x.double() - alpha * self._m
        weights = torch.softmax(self._log_w - 0.5 * (torch.log(spread) + centred**2 / spread), dim=1)
        return (weights * (self._m + alpha * self._v / spread * centred)).sum(1, keepdim=True).to(x.dtype)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        return x0


GM1D = Mixture((0.5, 0.3, 0.2), (-2.0, 0.5, 2.5), (0.25, 0.09, 0.36), c=1.5, q=1.0, lam=2.0)
GAUSS = Mixture((1.0,), (0.7,), (0.8,), c=2.5, q=1.0, lam=4.0)


def tilt(
    w: np.ndarray, m: np.ndarray, v: np.ndarray, c: float, q: float, lam: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Weights, means, variances and log Z of a mixture times ``exp(-lam (x - c)^2 / (2 q))``."""
    rho = lam / q
    variances = 1 / (1 / v + rho)
    logs = np.log(w) - 0.5 * np.log1p(v * rho) - 0.5 * (m - c) ** 2 / (v + 1 / rho)
    log_z = float(np.logaddexp.reduce(logs))
    return np.exp(logs - log_z), variances * (m / v + rho * c), variances, log_z


def mixture_moments(w: np.ndarray, m: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    mean = float(w @ m)
    return mean, float(w @ (v + m**2) - mean**2)


@dataclass(frozen=True)
class ExactKernel:
    """A solver that draws from the exact reverse kernel of a mixture: no discretisation error at any T."""

    law: Mixture

    process = "gaussian"
    order = 1
    stochastic = True
    asks_once = True

    def nfe(self, num_steps: int) -> int:
        return num_steps

    def step(self, model: Any, state: State, t: float, s: float, noise: Any) -> State:
        x0_hat = model.denoise(state.x, t)
        log_w, mean, var = self._parts(model.process, state.x.double(), t, s)
        cumulative = torch.softmax(log_w, dim=1).cumsum(1)
        pick = (cumulative < noise.uniform((1,), "component")).sum(1).clamp(max=len(self.law.w) - 1)
        rows = torch.arange(len(pick))
        x = mean[rows, pick] + torch.sqrt(var[pick]) * noise.normal((1,), "step")[:, 0].double()
        return State(x[:, None].to(state.x.dtype), x0_hat, None, state.step + 1)

    def kernel(self, process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        """Of a single Gaussian, whose kernel is Gaussian too."""
        _, mean, var = self._parts(process, x.double(), t, s)
        assert mean.shape[1] == 1
        return mean.to(x.dtype), math.sqrt(float(var[0]))

    def _parts(self, process: Any, x: Tensor, t: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
        alpha_t, alpha_s, sigma_t, sigma_s = process.alpha(t), process.alpha(s), process.sigma(t), process.sigma(s)
        k = alpha_t / alpha_s
        rest = sigma_t**2 - k**2 * sigma_s**2
        w, m, v = (torch.from_numpy(a) for a in self.law.arrays())
        at_s, at_t = alpha_s**2 * v + sigma_s**2, alpha_t**2 * v + sigma_t**2
        log_w = torch.log(w) - 0.5 * (torch.log(at_t) + (x - alpha_t * m) ** 2 / at_t)
        var = 1 / (1 / at_s + k**2 / rest)
        return log_w, var * (alpha_s * m / at_s + k * x / rest), var


def weighted_moments(x: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Self-normalised mean and variance of every group, (B, K) each -> (B,)."""
    weights = torch.softmax(log_w, dim=1)
    mean = (weights * x).sum(1)
    return mean, (weights * x**2).sum(1) - mean**2


def log_mean(log_z: Tensor) -> tuple[float, float]:
    """log of the mean of Z over runs, and its standard error."""
    ratio = torch.exp(log_z - log_z.max())
    return float(log_z.max() + torch.log(ratio.mean())), float(ratio.std() / ratio.mean() / math.sqrt(len(ratio)))


def uniform(steps: int) -> tuple[float, ...]:
    """Equal steps from 1 to 0."""
    return tuple(1 - i / steps for i in range(steps)) + (0.0,)


GRID = np.linspace(-12.0, 12.0, 24001)


def log_density(law: Mixture) -> np.ndarray:
    """log p on ``GRID``."""
    w, m, v = law.arrays()
    return np.logaddexp.reduce(np.log(w) - 0.5 * np.log(2 * np.pi * v) - 0.5 * (GRID[:, None] - m) ** 2 / v, axis=1)


def quadrature(log_p: np.ndarray) -> tuple[float, float, float]:
    """Mean, variance and log of the mass of a density on ``GRID``."""
    top = log_p.max()
    p = np.exp(log_p - top)
    log_mass = float(top + np.log(p.sum() * (GRID[1] - GRID[0])))
    p /= p.sum()
    mean = float(p @ GRID)
    return mean, float(p @ GRID**2) - mean**2, log_mass
