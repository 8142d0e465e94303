"""Euler's method on the probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("euler")
@dataclass(frozen=True)
class Euler:
    """Euler on ``d(x / alpha) = eps_hat d(sigma / alpha)``; on a rectified flow, Euler on ``dx = v dt``.

    Both are the same update: ``x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0_hat``.

    Reference: Karras et al. 2022, algorithm 1 without the correction; Liu et al. 2022 for flows.
    Cost and order: one evaluation a step; first order; deterministic.
    Identities: exactly DDIM with eta=0.
    """

    process = "gaussian"
    order = 1
    stochastic = False

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = model.denoise(state.x, t)
        return State(transfer(model.process, state.x, x0_hat, t, s), x0_hat, None, state.step + 1)
