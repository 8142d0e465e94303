"""Heun's second-order method on the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("heun")
@dataclass(frozen=True)
class Heun:
    """Heun's method: an Euler step to s, then again with the mean of the slopes at both ends.

    VP and EDM processes are integrated in ``y = x / alpha`` over ``sigma / alpha`` (slope eps), rectified flows in x
    over t (slope eps - x_0), which is finite at their start, where alpha is 0. A step to sigma = 0 is an Euler step,
    since no network is defined there; so a run of N steps costs 2N - 1 evaluations, an odd number.
    ``leading_euler_steps`` makes the first steps plain Euler steps too, which is how an even number of evaluations is
    spent exactly.

    Args:
        leading_euler_steps: number of first steps that are not corrected.

    Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1.
    Cost and order: two evaluations a step but the last; second order; deterministic.
    """

    leading_euler_steps: int = 0

    process = "gaussian"
    order = 2
    stochastic = False

    def __post_init__(self) -> None:
        if self.leading_euler_steps < 0:
            raise ValueError(f"solver.leading_euler_steps must be at least 0, got {self.leading_euler_steps}.")

    def nfe(self, num_steps: int) -> int:
        """2N - 1, less one for every uncorrected leading step."""
        return 2 * num_steps - 1 - min(self.leading_euler_steps, num_steps - 1)

    def nfe_before_data(self, num_steps: int) -> int:
        """A run that stops before t=0 corrects its last step too."""
        return 2 * num_steps - min(self.leading_euler_steps, num_steps)

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """Odd: Heun all the way. Even: the first step is an Euler step."""
        return {"leading_euler_steps": 1 - nfe % 2}, nfe // 2 + 1

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process = model.process
        x0_t = model.denoise(state.x, t)
        x = transfer(process, state.x, x0_t, t, s)
        if state.step >= self.leading_euler_steps and process.sigma(s) > 0:
            x0_s = model.denoise(x, s)
            scale_t, u_t = process.ode(t)
            scale_s, u_s = process.ode(s)
            slope = 0.5 * (_slope(process, state.x, x0_t, t) + _slope(process, x, x0_s, s))
            x = (scale_s / scale_t) * state.x + (scale_s * (u_s - u_t)) * slope
        return State(x, x0_t, None, state.step + 1)


def _slope(process: Any, x: Tensor, x0: Tensor, t: float) -> Tensor:
    eps = (x - process.alpha(t) * x0) / process.sigma(t)
    return eps - x0 if process.kind_of_path == "linear" else eps
