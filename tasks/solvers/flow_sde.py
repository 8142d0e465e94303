"""Euler-Maruyama on a flow's stochastic twin, as reinforcement-learning code steps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.kernels import flow_sde
from tasks.processes import transfer
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

DIFFUSIONS = ("grpo", "constant", "quadratic")


@solvers.register("flow_sde")
@dataclass(frozen=True)
class FlowSDE:
    """The SDE with a rectified flow's marginals, by Euler-Maruyama: ODE steps outside a window, stochastic ones inside.

    With dt = s - t < 0 and g the diffusion: ``mean = x (1 + g^2 dt / (2 t)) + u (1 + g^2 (1 - t) / (2 t)) dt``,
    ``std = g sqrt(-dt)``; g = eta sqrt(t / (1 - t)) as in Flow-GRPO, the constant eta as in DanceGRPO, or eta t^2 as in
    rollover budget forcing (there eta = 3).

    Args:
        eta: strength; sqrt(2) is the full reverse SDE of ``grpo``.
        diffusion: grpo, constant or quadratic.
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
    asks_once = True

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise unknown("diffusion", self.diffusion, list(DIFFUSIONS), "Allowed")
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
        mean, std = flow_sde(state.x, x0_hat, t, s, self._g2(t, times[i + 1]))
        x = mean + std * noise.normal(tuple(mean.shape[1:]), purpose="step")
        return State(x, x0_hat, memory, state.step + 1)

    def _g2(self, t: float, following: float) -> float:
        """The squared diffusion at t; where that of ``grpo`` is infinite, at t=1, its value at the next node."""
        if self.diffusion == "grpo":
            level = t if t < 1.0 else following
            return self.eta**2 * (level / (1.0 - level))
        return self.eta**2 * (t**4 if self.diffusion == "quadratic" else 1.0)

    def kernel(self, process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of x_s given x_t = x and its clean prediction; without a window only."""
        assert self.window is None, "inside a window the step's number decides"
        if s == 0 or self.eta == 0:
            return transfer(process, x, x0_hat, t, s), 0.0
        return flow_sde(x, x0_hat, t, s, self._g2(t, s))
