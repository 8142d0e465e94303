"""Multistep consistency sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.few_step import end_time, flow_end, noised, refuse_negative, refuse_times_below
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
