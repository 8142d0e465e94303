"""Noising processes, and the one place where predictions are converted into one another.

Notation, fixed for the whole project: time runs from t=1 (noise) to t=0 (data); ``x_t = alpha(t) x_0 + sigma(t) eps``
with eps ~ N(0, I); ``lam(t) = log(alpha / sigma)`` grows towards the data. A step goes from ``t`` to ``s < t``.
All schedule arithmetic is done in float64; every function takes a float (and returns a float) or a tensor of times
(and returns a float64 tensor of the same shape on the same device).

A process also knows the time that its networks were trained with, ``model_time(t)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Time = float | Tensor


def _on_arrays(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let a float64 numpy formula take a float or a tensor of times."""

    def wrapped(self: Any, t: Time) -> Any:
        with np.errstate(divide="ignore", over="ignore"):
            if isinstance(t, Tensor):
                values = function(self, t.detach().cpu().double().numpy())
                return torch.as_tensor(np.asarray(values, dtype=np.float64), device=t.device)
            return float(function(self, np.float64(t)))

    wrapped.__doc__ = function.__doc__
    wrapped.__name__ = function.__name__
    return wrapped


def expand(value: Time, x: Tensor) -> Any:
    """A number, or numbers of rows (B,), shaped to multiply states (B, *shape) in their dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class _Gaussian:
    """What every Gaussian process shares once ``alpha`` and ``sigma`` are known."""

    kind = "gaussian"
    kind_of_path = "curved"

    def _alpha(self, t: Any) -> Any:
        raise AssertionError("every process defines it")

    def _sigma(self, t: Any) -> Any:
        raise AssertionError("every process defines it")

    @_on_arrays
    def lam(self, t):
        """Half the log signal-to-noise ratio, log(alpha / sigma): -inf where alpha is 0, +inf where sigma is 0."""
        return np.log(self._alpha(t)) - np.log(self._sigma(t))

    @_on_arrays
    def alpha(self, t):
        """Signal scale at t."""
        return self._alpha(t)

    @_on_arrays
    def sigma(self, t):
        """Noise scale at t."""
        return self._sigma(t)

    def prior_std(self, t: float = 1.0) -> float:
        """Standard deviation of the starting noise of a run that begins at t."""
        return self.sigma(t)

    def prior(self, shape: tuple[int, ...], noise: Any, t: float = 1.0) -> Tensor:
        """Draw the start of a run at time t: N(0, prior_std(t)^2 I), (B, *shape)."""
        return self.prior_std(t) * noise.normal(shape, purpose="prior")

    def ode(self, t: float) -> tuple[float, float]:
        """Coordinates (scale, u) in which the probability-flow ODE is ``d(x / scale) = slope du``.

        The slope is eps in (alpha, sigma / alpha), or eps - x_0 in (1, t) on a linear path, where alpha starts at 0.
        """
        return (1.0, t) if self.kind_of_path == "linear" else (self.alpha(t), self.sigma(t) / self.alpha(t))

    def renoise(self, x: Tensor, s: float, t: float, noise: Any) -> Tensor:
        """Carry x from time s to a noisier time t > s by the forward process, (B, *shape)."""
        ratio = self.alpha(t) / self.alpha(s)
        std = math.sqrt(max(self.sigma(t) ** 2 - (ratio * self.sigma(s)) ** 2, 0.0))
        return ratio * x + std * noise.normal(tuple(x.shape[1:]), purpose="renoise")

    def readout(self, x0_hat: Tensor, noise: Any) -> Tensor:
        """A clean-looking guess from the posterior mean; for Gaussian data the mean itself."""
        return x0_hat


@lru_cache(maxsize=32)
def _log_alpha_table(schedule: str, beta_start: float, beta_end: float, num_train_steps: int) -> np.ndarray:
    """log alpha at the nodes t = n / T, n = 0..T, where node n + 1 is training step n and node 0 is clean data."""
    if schedule == "linear":
        betas = np.linspace(beta_start, beta_end, num_train_steps, dtype=np.float64)
    elif schedule == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=np.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        nodes = np.arange(num_train_steps + 1) / num_train_steps
        bar = np.cos((nodes + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise ValueError(
            f"unknown beta schedule {schedule!r}; allowed: linear, scaled_linear, squaredcos_cap_v2. "
            "Set the scheduler's beta_schedule to one of these."
        )
    return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-betas))])


@dataclass(frozen=True)
class VP(_Gaussian):
    """Variance-preserving process of a discrete-time diffusion model, from a diffusers scheduler's betas.

    ``alpha(t)^2`` is the scheduler's ``alphas_cumprod`` at training step ``n = T t - 1`` and 1 at t=0; between the
    nodes log alpha is linear in t, which is the continuation that DPM-Solver uses.

    Args:
        schedule: name of the beta table: linear, scaled_linear, squaredcos_cap_v2.
        beta_start: first beta (linear tables).
        beta_end: last beta (linear tables).
        num_train_steps: number of training steps T.

    Reference: Ho et al. 2020 (table); Lu et al. 2022, "DPM-Solver", appendix D.4 (continuation).
    """

    schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    num_train_steps: int = 1000

    @cached_property
    def _table(self) -> np.ndarray:
        return _log_alpha_table(self.schedule, self.beta_start, self.beta_end, self.num_train_steps)

    @cached_property
    def _nodes(self) -> np.ndarray:
        return np.linspace(0.0, 1.0, self.num_train_steps + 1)

    @property
    def t_min(self) -> float:
        """The time of the first training step, below which the network was never trained."""
        return 1.0 / self.num_train_steps

    def prior_std(self, t: float = 1.0) -> float:
        """1 wherever the run begins, as in every diffusers pipeline: alpha^2 + sigma^2 = 1."""
        return 1.0

    def _alpha(self, t):
        return np.exp(np.interp(t, self._nodes, self._table))

    def _sigma(self, t):
        return np.sqrt(-np.expm1(2 * np.interp(t, self._nodes, self._table)))

    @_on_arrays
    def time(self, lam):
        """The time at which half log-SNR equals ``lam`` (inverse of :meth:`lam`)."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * lam)
        return np.interp(log_alpha, self._table[::-1], self._nodes[::-1])

    @_on_arrays
    def model_time(self, t):
        """The (fractional) training step that the network is told, n = T t - 1, never below 0."""
        return np.maximum(t * self.num_train_steps - 1.0, 0.0)


@dataclass(frozen=True)
class EDM(_Gaussian):
    """Variance-exploding process of EDM: alpha = 1, sigma = sigma_max t.

    Args:
        sigma_min: smallest noise level that the network was trained for.
        sigma_max: noise level at t=1.

    Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def t_min(self) -> float:
        """The time of ``sigma_min``."""
        return self.sigma_min / self.sigma_max

    def _alpha(self, t):
        return np.ones_like(t)

    def _sigma(self, t):
        return t * self.sigma_max

    @_on_arrays
    def time(self, lam):
        """The time at which half log-SNR equals ``lam`` (inverse of :meth:`lam`)."""
        return np.exp(-lam) / self.sigma_max

    @_on_arrays
    def model_time(self, t):
        """The noise level itself; EDM networks are conditioned on sigma (their wrapper takes log(sigma) / 4)."""
        return t * self.sigma_max


@dataclass(frozen=True)
class Flow(_Gaussian):
    """Rectified-flow (linear interpolation) process: alpha = 1 - t, sigma = t.

    Args:
        num_train_steps: the network is told ``t * num_train_steps``.

    Reference: Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching", optimal-transport path.
    """

    num_train_steps: int = 1000

    kind_of_path = "linear"

    @property
    def t_min(self) -> float:
        """A thousandth: below it the log-SNR grids would run to infinity."""
        return 1.0 / self.num_train_steps

    def _alpha(self, t):
        return 1.0 - t

    def _sigma(self, t):
        return t * np.ones_like(t)

    @_on_arrays
    def time(self, lam):
        """The time at which half log-SNR equals ``lam`` (inverse of :meth:`lam`)."""
        return 1.0 / (1.0 + np.exp(lam))

    @_on_arrays
    def model_time(self, t):
        """t in units of training steps."""
        return t * self.num_train_steps


@dataclass(frozen=True)
class Masked:
    """Absorbing-state process on tokens: at time t each token is the mask with probability t (linear schedule).

    ``alpha(t) = 1 - t`` is the probability that a token survives. The mask is token number ``vocabulary``.

    Args:
        vocabulary: number of real tokens V; states use V + 1 symbols.

    Reference: Austin et al. 2021, "Structured Denoising Diffusion Models in Discrete State-Spaces"; Sahoo et al. 2024.
    """

    vocabulary: int = 2
    kind = "masked"
    t_min = 0.0

    def alpha(self, t: float) -> float:
        """Probability that a token is not masked at t."""
        return 1.0 - t

    @property
    def mask(self) -> int:
        """The index of the mask symbol."""
        return self.vocabulary

    def prior(self, shape: tuple[int, ...], noise: Any, t: float = 1.0) -> Tensor:
        """All tokens masked, (B, L) int64."""
        return torch.full((noise.num_rows, *shape), self.vocabulary, dtype=torch.int64, device=noise.device)

    def renoise(self, x: Tensor, s: float, t: float, noise: Any) -> Tensor:
        """Mask further tokens so that x goes from time s to a noisier time t, (B, L) int64."""
        keep = noise.uniform(tuple(x.shape[1:]), purpose="renoise") < self.alpha(t) / self.alpha(s)
        return torch.where(keep, x, torch.full_like(x, self.vocabulary))

    def readout(self, x0_hat: Tensor, noise: Any) -> Tensor:
        """Draw each token from its class probabilities, (B, L, V) -> (B, L) int64."""
        return categorical(x0_hat, noise.uniform(tuple(x0_hat.shape[1:-1]), purpose="readout"))


GaussianProcess = VP | EDM | Flow
Process = VP | EDM | Flow | Masked


def categorical(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution in float64: (…, V) probabilities and (…,) uniforms -> (…,) int64."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative <= threshold).sum(-1).clamp_(max=probabilities.shape[-1] - 1)


# --- predictions -----------------------------------------------------------------------------------------------------
# Each is a linear target y = a eps + b x0. The names are those of diffusers; "flow" is its flow-matching velocity
# dx/dt = eps - x0, "reversed_flow" is x0 - eps (InstaFlow's sign), and "score" is grad log p_t = -eps / sigma.


def _coefficients(kind: str, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    if kind == "epsilon":
        return 1.0, 0.0
    if kind == "sample":
        return 0.0, 1.0
    if kind == "v_prediction":
        return alpha, -sigma
    if kind == "flow":
        return 1.0, -1.0
    if kind == "reversed_flow":
        return -1.0, 1.0
    if kind == "score":
        return -1.0 / sigma, 0.0
    raise ValueError(
        f"unknown prediction {kind!r}; allowed: epsilon, sample, v_prediction, flow, reversed_flow, "
        "score. "
        "Set prediction_type in the model's scheduler configuration."
    )


def to_x0(kind: str, x: Tensor, y: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """The clean prediction x0 implied by prediction ``y`` of type ``kind`` at state x; all (B, *shape).

    ``x0 = (a x - sigma y) / (a alpha - b sigma)`` for the target ``y = a eps + b x0``. At alpha = 0 only targets with
    b != 0 define it.
    """
    a, b = _coefficients(kind, alpha, sigma)
    if kind == "sample":
        return y
    scale = 1.0 / (a * alpha - b * sigma)
    return (a * scale) * x - (sigma * scale) * y


def from_x0(kind: str, x: Tensor, x0: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """The prediction of type ``kind`` that means ``x0`` at state x (sigma > 0); all (B, *shape)."""
    if kind == "sample":
        return x0
    a, b = _coefficients(kind, alpha, sigma)
    eps = (x - alpha * x0) / sigma
    return a * eps + b * x0


# --- one step formula that several solvers share ---------------------------------------------------------------------


def transfer(process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float) -> Tensor:
    """Move x from t to s along the straight line that ``x0_hat`` implies; (B, *shape).

    ``x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0_hat``: the deterministic DDIM update, the
    Euler step in (x / alpha, sigma / alpha), and the first-order exponential integrator in either prediction. It is the
    one update that stays finite at alpha = 0 and lands on ``x0_hat`` at sigma = 0.
    """
    ratio = process.sigma(s) / process.sigma(t)
    return ratio * x + (process.alpha(s) - process.alpha(t) * ratio) * x0_hat


# --- grids laid out in noise level -----------------------------------------------------------------------------------


def lam_range(process: Any, start: float = 1.0) -> tuple[float, float]:
    """Half log-SNR at the first and last node of such a grid; 1 - t_min stands in where it is infinite at the start."""
    if not hasattr(process, "lam"):
        raise ValueError("times laid out in noise level need a Gaussian model. Use times=uniform.")
    first = start if math.isfinite(process.lam(start)) else start - process.t_min
    return process.lam(first), process.lam(process.t_min)


def times_from_lam(process: Any, start: float, lams: np.ndarray) -> tuple[float, ...]:
    """The times of such nodes, with the first put at exactly the start and a last jump to 0 added."""
    return (start, *(process.time(float(lam)) for lam in lams[1:]), 0.0)
