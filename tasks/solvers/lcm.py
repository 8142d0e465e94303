"""Sampling of latent consistency models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.few_step import flow_end, noised
from tasks.processes import VP
from tasks.registry import solvers
from tasks.types import Noise, State


@solvers.register("lcm")
@dataclass(frozen=True)
class LCM:
    """Latent consistency sampling: multistep consistency sampling whose network is scaled to be the identity at n=0.

    ``x_0 = c_skip x_t + c_out f(x_t, t)`` with ``c_skip = d^2 / (m^2 + d^2)``, ``c_out = m / sqrt(m^2 + d^2)`` and
    ``m = timestep_scaling n`` at training step n; then ``x_s = alpha_s x_0 + sigma_s z``, and no noise in a step to
    s=0. Published models take the original 50-step grid's nodes as times: give those with times=explicit.

    Args:
        boundary: whether the solver applies c_skip and c_out, as for the published checkpoints; false for a model
            that is the identity at the data by itself.
        sigma_data: d.
        timestep_scaling: steepness of the boundary; 10 leaves c_skip = 0.0025 at n = 1.

    Reference: Luo et al. 2023, "Latent Consistency Models", algorithm 3 and eq. 9 with the constants of its code.
    Cost and order: one evaluation a step; no order, since its model knows the end of the flow, not its slope;
        stochastic.
    Identities: with boundary=false this is exactly consistency.
    """

    boundary: bool = True
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    process = "gaussian"
    order = 0
    stochastic = True
    needs = "flow_end"

    def __post_init__(self) -> None:
        for name, value in (("sigma_data", self.sigma_data), ("timestep_scaling", self.timestep_scaling)):
            if value <= 0:
                raise ValueError(f"solver.{name} must be above 0, got {value}. The published value is the default.")

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, grid: Sequence[float]) -> None:
        """Refuse processes that have no training steps to lay the boundary in."""
        if self.boundary and not isinstance(process, VP):
            raise ValueError(
                f"solver lcm scales by training steps, which a {type(process).__name__} process does not have; "
                "allowed: VP. Set solver.boundary=false or use solver=consistency."
            )

    def step(self, model: Any, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process = model.process
        x0_hat = flow_end(model, state.x, t)
        if self.boundary:
            m, d = self.timestep_scaling * process.model_time(t), self.sigma_data
            x0_hat = (d**2 / (m**2 + d**2)) * state.x + (m / math.sqrt(m**2 + d**2)) * x0_hat
        x = x0_hat if s == 0 else noised(process, x0_hat, 0.0, s, noise)
        return State(x, x0_hat, None, state.step + 1)
