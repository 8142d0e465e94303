"""Euler-Maruyama on a flow's stochastic twin, as reinforcement-learning code steps it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tasks.processes import transfer
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State


@solvers.register("flow_sde")
@dataclass(frozen=True)
class FlowSDE:
    """The SDE with a rectified flow's marginals, by Euler-Maruyama: ODE steps outside a window, stochastic ones inside.

    With dt = s - t < 0 and g the diffusion: ``mean = x (1 + g^2 dt / (2 t)) + u (1 + g^2 (1 - t) / (2 t)) dt``,
    ``std = g sqrt(-dt)``; g = eta sqrt(t / (1 - t)) as in Flow-GRPO, or the constant eta as in DanceGRPO.

    Args:
        eta: strength; sqrt(2) is the full reverse SDE of ``grpo``.
        diffusion: grpo or constant.
        window: [first, last + 1] of the stochastic steps (MixGRPO's sliding window); null makes all stochastic but the
            last.

    Reference: Liu et al. 2025, "Flow-GRPO", eq. 9; Xue et al. 2025, "DanceGRPO"; Li et al. 2025, "MixGRPO".
    Cost and order: one evaluation a step; weak order 1, marginals are kept in the limit of many steps only (the first
    step inflates the variance); ``solver=unified solver.kappa=…`` takes exact steps, with kappa = eta / sqrt(2).
    Identities: with eta=0 this is Euler on the velocity.
    """

    eta: float = 0.7
    diffusion: str = "grpo"
    window: tuple[int, ...] | None = None

    process = "gaussian"
    order = 1

    def __post_init__(self) -> None:
        if self.diffusion not in ("grpo", "constant"):
            raise unknown("diffusion", self.diffusion, ["grpo", "constant"], "Allowed")
        ends = (0, 0) if self.window is None else self.window
        if self.eta < 0 or len(ends) != 2 or not 0 <= ends[0] <= ends[1]:
            raise ValueError(
                f"flow_sde needs eta >= 0 and a window [first, last + 1], got {self.eta} and {self.window}."
            )

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

    def check(self, process: Any, times: tuple[float, ...]) -> None:
        """Refuse processes that are no flows, and a window that reaches the last step."""
        if process.kind_of_path != "linear":
            raise ValueError(
                f"flow_sde steps rectified flows, but the process is {type(process).__name__}. Use solver=ddim "
                "solver.eta=1, or unified with kappa."
            )
        if self.window is not None and self.window[1] > len(times) - 2:
            raise ValueError(f"solver.window must end by step {len(times) - 2}, got {list(self.window)}.")

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """The times, since the diffusion is infinite at t=1 and takes its value at the next node there."""
        return {"times": times, "step": 0}

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = model.denoise(state.x, t)
        memory = state.memory
        i, times = memory["step"], memory["times"]
        memory = memory | {"step": i + 1}
        inside = s > 0 if self.window is None else self.window[0] <= i < self.window[1]
        if not inside or self.eta == 0:
            return State(transfer(model.process, state.x, x0_hat, t, s), x0_hat, memory, state.step + 1)
        velocity = (state.x - x0_hat) / t
        level = t if t < 1.0 else times[i + 1]
        g2 = self.eta**2 * (level / (1.0 - level) if self.diffusion == "grpo" else 1.0)
        dt = s - t
        mean = state.x * (1.0 + g2 * dt / (2 * t)) + velocity * ((1.0 + g2 * (1.0 - t) / (2 * t)) * dt)
        x = mean + math.sqrt(-g2 * dt) * noise.normal(tuple(mean.shape[1:]), purpose="step")
        return State(x, x0_hat, memory, state.step + 1)
