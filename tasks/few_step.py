"""What solvers of few-step models share: where a model's flow ends, the way there, and the noise to come back with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tasks.types import Noise


def end_time(process: Any, sigma_min: float) -> float:
    """The time at which sigma / alpha is ``sigma_min``."""
    return process.time(-math.log(sigma_min)) if sigma_min > 0 else 0.0


def flow_end(model: Any, x: Tensor, t: float, end: float = 0.0) -> Tensor:
    """The end of the trajectory through (x, t), (B, *shape): by the flow map where there is one, else the answer.

    A model that has both, such as a single Gaussian, answers ``denoise`` with the posterior mean.
    """
    return model.flow_map(x, t, end) if getattr(model, "maps", False) else model.denoise(x, t)


def noised(process: Any, x: Tensor, s: float, t: float, noise: Noise) -> Tensor:
    """Carry x from time s to a noisier time t > s by the forward process, (B, *shape).

    The process has the same (``renoise``); this one draws as a solver's step does, so that a strategy which renoises
    at the same step does not meet the same numbers.
    """
    ratio = process.alpha(t) / process.alpha(s)
    std = math.sqrt(max(process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2, 0.0))
    return ratio * x + std * noise.normal(tuple(x.shape[1:]), purpose="step")


def refuse_negative(sigma_min: float) -> None:
    """A noise level is no less than 0."""
    if sigma_min < 0:
        raise ValueError(
            f"solver.sigma_min must be at least 0, got {sigma_min}. Use 0 for a model whose flow ends at the data."
        )


def refuse_times_below(process: Any, grid: Sequence[float], sigma_min: float) -> None:
    """Times between the end of the flow and the data are no times of the model."""
    below = [t for t in grid if t > 0 and sigma_min > 0 and process.lam(t) >= -math.log(sigma_min)]
    if below:
        raise ValueError(
            f"time {below[0]} lies at or below solver.sigma_min={sigma_min}, where the model's flow ends. All times "
            f"but a last 0 must be above {end_time(process, sigma_min):.6g}; use fewer steps, another grid or a "
            "smaller sigma_min."
        )
