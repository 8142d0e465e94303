"""The mean-reverting process of image restoration, in coordinates centred on the degraded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.processes import _Gaussian, _on_arrays
from tasks.registry import unknown

SCHEDULES = ("cosine", "constant")
_OFFSET = 0.008  # the s of the cosine schedule


@dataclass(frozen=True)
class MeanReverting(_Gaussian):
    """Mean-reverting process: a clean image decays into its degraded version mu plus stationary noise.

    ``dx = theta (mu - x) dt + sqrt(2 theta) sigma_inf dw`` has the law ``x_t = alpha x_0 + (1 - alpha) mu + sigma eps``
    with ``alpha = exp(-int theta)`` and ``sigma = sigma_inf sqrt(1 - alpha^2)``. In the coordinates ``x - mu`` the
    clean state is ``x_0 - mu`` and this is an ordinary Gaussian process whose schedule is not variance-preserving; so
    states are kept in these coordinates, every solver applies, and a model's ``decode`` adds mu again.

    The published table has T entries, ``theta_i dt`` summed up to i; here the sum is its integral, so that times are
    continuous; at T = 100 the two alphas differ by at most 0.019. ``t = 1`` is their step T, where alpha is ``delta``;
    theta is ``1 - cos^2(a(t)) / cos^2(a(0))`` with ``a(t) = (t + s) / (1 + s) pi / 2``, or constant, and scaled to get
    there. Runs start from ``sigma(1)``, the published ``sigma_inf`` up to a factor ``1 - delta^2 / 2``.

    Args:
        sigma_inf: stationary noise. The published 50/255 is for images in [0, 1]; states in [-1, 1] are twice as wide.
        schedule: how theta runs: cosine or constant.
        delta: what is left of the signal at t=1, strictly between 0 and 1.
        num_train_steps: number of training steps T; the network is told ``T t``.

    Reference: Luo et al. 2023, "Image Restoration with Mean-Reverting Stochastic Differential Equations", section 3,
        and their code (schedules, T, delta, sigma_inf); Li et al. 2025, "MaRS: A Fast Sampler for Mean Reverting
        Diffusion based on ODE and SDE Solvers".
    """

    sigma_inf: float = 2 * 50 / 255
    schedule: str = "cosine"
    delta: float = 0.005
    num_train_steps: int = 100

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("theta schedule", self.schedule, list(SCHEDULES), "Allowed")
        if not self.sigma_inf > 0:
            raise ValueError(f"sigma_inf must be positive, got {self.sigma_inf}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie strictly between 0 and 1, got {self.delta}.")
        if self.num_train_steps < 1:
            raise ValueError(f"num_train_steps must be at least 1, got {self.num_train_steps}.")

    @property
    def t_min(self) -> float:
        """The time of the first training step, below which the network was never trained."""
        return 1.0 / self.num_train_steps

    def _decay(self, t: Any) -> Any:
        """The integral of theta from 0 to t, which is -log alpha; -log delta at t=1."""
        share = t if self.schedule == "constant" else _cosine_integral(_WIDTH * t) / _cosine_integral(_WIDTH)
        return -math.log(self.delta) * share

    def _alpha(self, t):
        return np.exp(-self._decay(t))

    def _sigma(self, t):
        return self.sigma_inf * np.sqrt(-np.expm1(-2.0 * self._decay(t)))

    @_on_arrays
    def time(self, lam):
        """The time at which half log-SNR equals ``lam`` (inverse of :meth:`lam`); 1 for what is noisier still."""
        # alpha^2 is the logistic function of 2 (lam + log sigma_inf), and the decay is -log alpha.
        decay = 0.5 * np.logaddexp(0.0, -2.0 * (lam + math.log(self.sigma_inf)))
        share = np.minimum(decay / -math.log(self.delta), 1.0)
        return share if self.schedule == "constant" else _inverse(share * _cosine_integral(_WIDTH)) / _WIDTH

    @_on_arrays
    def model_time(self, t):
        """The (fractional) training step that the network is told, n = T t."""
        return t * self.num_train_steps


# theta = 1 - cos^2(a) / cos^2(a_0) with a = a_0 + w / 2 and w = WIDTH t is proportional to cos(2 a_0) - cos(2 a_0 + w).
_START = math.pi * _OFFSET / (1 + _OFFSET)  # 2 a_0
_WIDTH = math.pi / (1 + _OFFSET)
_COS, _SIN = math.cos(_START), math.sin(_START)


def _cosine_integral(w: Any) -> Any:
    """int_0^w (cos(2 a_0) - cos(2 a_0 + v)) dv, as a sum of terms that are not negative, so that nothing cancels."""
    return _COS * _w_minus_sin(w) + _SIN * 2.0 * np.sin(0.5 * w) ** 2


def _w_minus_sin(w: Any) -> Any:
    """w - sin w; by its series below 1/2, where the difference would lose digits."""
    z, total = w * w, 1.0
    for n in (12, 10, 8, 6, 4):
        total = 1.0 - z / (n * (n + 1)) * total
    return np.where(np.abs(w) < 0.5, w * z / 6.0 * total, w - np.sin(w))


def _inverse(area: Any) -> Any:
    """The w in [0, WIDTH] whose integral is ``area``: Newton's method on logarithms, where the slope is 2 to 3."""
    target = np.maximum(area, 1e-300)
    # Each of the two terms alone bounds w from above.
    w = np.minimum(np.minimum(np.cbrt(6.0 * target / _COS), np.sqrt(2.0 * target / _SIN)), _WIDTH)
    for _ in range(10):
        value = _cosine_integral(w)
        slope = w * (_COS * 2.0 * np.sin(0.5 * w) ** 2 + _SIN * np.sin(w)) / value
        w = np.minimum(w * np.exp((np.log(target) - np.log(value)) / slope), _WIDTH)
    return np.where(area > 0, w, 0.0)
