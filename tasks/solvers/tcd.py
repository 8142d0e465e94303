"""Strategic stochastic sampling of trajectory consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.few_step import flow_end, noised
from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Noise, State


@solvers.register("tcd")
@dataclass(frozen=True)
class TCD:
    """Strategic stochastic sampling: a DDIM jump past s to ``s' = (1 - eta) s``, then noise to come back to s.

    ``x_s' = (sigma_s' / sigma_t) x_t + (alpha_s' - alpha_t sigma_s' / sigma_t) f(x_t, t)`` and
    ``x_s = (alpha_s / alpha_s') x_s' + sqrt(sigma_s^2 - (alpha_s / alpha_s')^2 sigma_s'^2) z``; a step to s=0 draws
    nothing. Guidance is distilled into published checkpoints, so it stays off.

    Args:
        eta: share of the way from s to the data that is jumped over and noised again (gamma in the paper); 0 is
            deterministic, 1 is multistep consistency sampling.

    Reference: Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 2.
    Cost and order: one evaluation a step; no order, since its model knows the end of the flow, not its slope;
        stochastic for eta > 0.
    Identities: with eta=0 this is DDIM along f, with eta=1 exactly consistency.
    """

    eta: float = 0.3

    process = "gaussian"
    order = 0
    needs = "flow_end"

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"solver.eta must be between 0 and 1, got {self.eta}.")

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def step(self, model: Any, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = flow_end(model, state.x, t)
        middle = (1.0 - self.eta) * s
        x = transfer(model.process, state.x, x0_hat, t, middle)
        if s > middle:
            x = noised(model.process, x, middle, s, noise)
        return State(x, x0_hat, None, state.step + 1)
