"""Multistep consistency sampling, and the arithmetic that few-step solvers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.registry import solvers
from tasks.types import Noise, State


@solvers.register("consistency")
@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling: jump to the end of the flow, put fresh noise on it, jump again.

    ``x_0 = f(x_t, t)``, then ``x_s = alpha_s (x_0 + sqrt((sigma_s / alpha_s)^2 - sigma_min^2) z)``; a step to s=0
    draws nothing. f is the model's answer, or its flow map to the end of the flow where it has one.

    Args:
        sigma_min: the noise level sigma / alpha at which the model's trajectories end; 0 when they end at the data,
            0.002 for the checkpoints of Song et al.

    Reference: Song et al. 2023, "Consistency Models", algorithm 1.
    Cost and order: one evaluation a step; no order, since a consistency model is exact for any step or for none;
        stochastic, and deterministic only as a whole of one step.
    """

    sigma_min: float = 0.0

    process = "gaussian"
    order = 0
    stochastic = True
    needs = "flow_end"

    def __post_init__(self) -> None:
        refuse_negative(self.sigma_min)

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, grid: Sequence[float]) -> None:
        """Refuse times below the end of the flow."""
        refuse_times_below(process, grid, self.sigma_min)

    def step(self, model: Any, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        end = end_time(model.process, self.sigma_min)
        x0_hat = flow_end(model, state.x, t, end)
        x = x0_hat if s == 0 else noised(model.process, x0_hat, end, s, noise)
        return State(x, x0_hat, None, state.step + 1)


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
            f"time {below[0]} lies at or below solver.sigma_min={sigma_min}, where the model's flow ends. All times but "
            f"a last 0 must be above {end_time(process, sigma_min):.6g}; use fewer steps, another grid or a smaller "
            "sigma_min."
        )
