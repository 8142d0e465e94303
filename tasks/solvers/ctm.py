"""Gamma sampling of consistency trajectory models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.few_step import end_time, noised, refuse_negative, refuse_times_below
from tasks.registry import solvers
from tasks.types import Noise, State


@solvers.register("ctm")
@dataclass(frozen=True)
class CTM:
    """Gamma sampling: jump along the flow to s~, between s and its clean end, then put noise on to come back to s.

    ``u~ = sqrt(1 - gamma^2) (u_s - sigma_min) + sigma_min`` with ``u = sigma / alpha``, then ``x~ = G(x_t, t -> s~)``
    and ``x_s = alpha_s (x~ / alpha~ + sqrt(u_s^2 - u~^2) z)``. G is the model's flow map where it has one. For a model
    that knows only the end of the flow, G is its first-order surrogate, the straight line in (x / alpha, u) from here
    to that end; many short steps on such lines lead elsewhere than the flow, so there a large gamma is the safe one.

    Args:
        gamma: 0 is deterministic, 1 is multistep consistency sampling.
        sigma_min: the noise level sigma / alpha at which the model's trajectories end; 0 when they end at the data,
            0.002 for the checkpoints of Kim et al.

    Reference: Kim et al. 2024, "Consistency Trajectory Models", algorithm 3 (gamma-sampling) and eq. 9 (what
        ``x0_hat`` is: the clean image g that a jump implies).
    Cost and order: one evaluation a step; no order, since a flow map is exact for any step; stochastic for gamma > 0.
    Identities: with gamma=1 this is exactly consistency.
    """

    gamma: float = 0.0
    sigma_min: float = 0.0

    process = "gaussian"
    order = 0
    needs = "flow_end"

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"solver.gamma must be between 0 and 1, got {self.gamma}.")
        refuse_negative(self.sigma_min)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.gamma > 0

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
        process = model.process
        end = end_time(process, self.sigma_min)
        middle = self._middle(process, s, end)
        # The line x~ = a x_t + b x_end; at end = 0 it is transfer's, finite where alpha_t is 0.
        alpha_t, alpha_m = process.alpha(t), process.alpha(middle)
        a = (process.sigma(middle) - alpha_m * self.sigma_min) / (process.sigma(t) - alpha_t * self.sigma_min)
        a = a if middle > end else 0.0  # no rounding where the line ends
        b = (alpha_m - a * alpha_t) / process.alpha(end)
        if getattr(model, "maps", False):
            x = model.flow_map(state.x, t, middle)
            x0_hat = x if middle == end else (x - a * state.x) / b
        else:
            x0_hat = model.denoise(state.x, t)
            x = a * state.x + b * x0_hat
        if s > middle and s > 0 and self.gamma > 0:
            x = noised(process, x, middle, s, noise)
        return State(x, x0_hat, None, state.step + 1)

    def _middle(self, process: Any, s: float, end: float) -> float:
        """s~."""
        if s == 0 or self.gamma == 1:
            return end
        if self.gamma == 0:
            return s
        level = process.sigma(s) / process.alpha(s) - self.sigma_min
        level = math.sqrt(1 - self.gamma**2) * level + self.sigma_min
        return min(process.time(-math.log(level)), s)
