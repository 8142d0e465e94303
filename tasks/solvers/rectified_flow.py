"""Euler steps of a rectified flow's velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("rectified_flow")
@dataclass(frozen=True)
class RectifiedFlow:
    """One or a few Euler steps of the velocity, which is all that a reflowed model needs.

    ``x_s = x_t + (s - t) v`` with ``v = (x_t - x0_hat) / t``, the velocity eps - x_0 of a straight path. One step from
    t=1 lands on ``x0_hat``: exact when the flow's paths are straight, as reflow makes them.

    Reference: Liu et al. 2022, "Flow Straight and Fast", eq. 1 and section 2.2; Liu et al. 2024, "InstaFlow".
    Cost and order: one evaluation a step; first order; deterministic.
    Identities: on a flow this is exactly Euler; other processes are refused.
    """

    process = "gaussian"
    order = 1
    stochastic = False
    needs = "posterior_mean"

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, grid: Sequence[float]) -> None:
        """Refuse processes whose path is not a straight line."""
        if process.kind_of_path != "linear":
            raise ValueError(
                f"solver rectified_flow steps flows, but this model's process is {type(process).__name__}; allowed: "
                "Flow. Use solver=euler or a model with a flow, for example model=digits_flow."
            )

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = model.denoise(state.x, t)
        # On a flow transfer is x + (s - t) v, arranged so that s = 0 gives x0_hat to the last bit.
        return State(transfer(model.process, state.x, x0_hat, t, s), x0_hat, None, state.step + 1)
