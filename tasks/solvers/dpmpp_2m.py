"""DPM-Solver++ (2M)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("dpmpp_2m")
@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++ (2M): second-order multistep exponential integrator of the clean prediction in log-SNR.

    ``x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) (D + (h / 2 h_prev) (D - D_prev))`` with h = lam_s - lam_t and
    D the clean predictions at t and at the time before (the midpoint form). The first step, a step from alpha = 0 and
    the step to sigma = 0 are of first order, because there the history or the log-SNR is not finite.

    Args:
        lower_order_final: make the last step first order even when it does not end at sigma = 0.

    Reference: Lu et al. 2022, "DPM-Solver++", algorithm 2; the midpoint form as in diffusers.
    Cost and order: one evaluation a step; second order; deterministic.
    Identities: with one step it is DDIM.
    """

    lower_order_final: bool = False

    process = "gaussian"
    order = 2
    stochastic = False

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """The memory before the first step: the time of the last one, and no history."""
        return {"last": times[-1], "lam": None, "x0": None}

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process, memory = model.process, state.memory
        x0_hat = model.denoise(state.x, t)
        lam_t, lam_s = process.lam(t), process.lam(s)
        direction = x0_hat
        final = self.lower_order_final and s == memory["last"]
        if memory["lam"] is not None and math.isfinite(memory["lam"]) and math.isfinite(lam_s) and not final:
            ratio = (lam_s - lam_t) / (lam_t - memory["lam"])
            direction = x0_hat + (0.5 * ratio) * (x0_hat - memory["x0"])
        x = transfer(process, state.x, direction, t, s)
        return State(x, x0_hat, memory | {"lam": lam_t, "x0": x0_hat}, state.step + 1)
