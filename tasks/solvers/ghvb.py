"""Generalised heavy-ball momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.processes import transfer
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State

# Coefficients of the backward differences in Adams-Bashforth's formula.
_ADAMS = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)


def ghvb_weights(order: int, beta: float) -> tuple[float, ...]:
    """Weights of v_n, v_{n-1}, …: ``(1 + ((1 - beta) / beta) nabla) (1 + nabla / 2 + …)`` cut at degree order - 1."""
    series = [
        _ADAMS[k] + ((1 - beta) / beta * _ADAMS[k - 1] if k else 0.0) for k in range(order)
    ]  # in powers of nabla = 1 - shift
    powers = [1.0] + [0.0] * (order - 1)
    weights = [0.0] * order
    for coefficient in series:
        weights = [w + coefficient * p for w, p in zip(weights, powers, strict=True)]
        powers = [p - q for p, q in zip(powers, [0.0, *powers[:-1]], strict=True)]
    return tuple(weights)


@solvers.register("ghvb")
@dataclass(frozen=True)
class GHVB:
    """GHVB: an averaged noise prediction, integrated by a multistep rule that knows of the averaging.

    ``v_n = (1 - beta) v_{n-1} + beta eps_n`` and ``y_{n+1} = y_n + (rho_{n+1} - rho_n) u_n`` in y = x / alpha over
    rho = sigma / alpha, with u_n the combination of v_n, v_{n-1}, … that keeps the order: for r = 2,
    ``((2 + beta) v_n - (2 - beta) v_{n-1}) / (2 beta)``. A smaller beta widens the region of stability, against the
    artefacts of few steps and large guidance. On a flow the velocity over t takes the noise's place.

    Args:
        max_order: r, from 1 to 5.
        beta: share of the new prediction, in (0, 1]. The paper's "GHVB 3.8" is max_order=4, beta=0.8.

    Reference: Wizadwongsa et al. 2024, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", section
        4.2.
    Cost and order: one evaluation a step; order min(r, 2) on uneven grids, whose weights are constant; deterministic.
    Identities: with beta=1 this is Adams-Bashforth (PLMS); with r=1 and beta=1 it is Euler.
    """

    max_order: int = 4
    beta: float = 0.8

    process = "gaussian"
    stochastic = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_order <= 5 or not 0 < self.beta <= 1:
            raise ValueError(
                f"ghvb needs max_order from 1 to 5 and beta in (0, 1], got {self.max_order} and {self.beta}."
            )

    @property
    def order(self) -> int:
        """min(r, 2)."""
        return min(self.max_order, 2)

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def start(self, process: Any, times: tuple[float, ...]) -> tuple[Tensor, ...]:
        """No velocities yet."""
        return ()

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process = model.process
        x0_hat = model.denoise(state.x, t)
        linear = process.kind_of_path == "linear"
        eps = (state.x - process.alpha(t) * x0_hat) / process.sigma(t)
        slope = eps - x0_hat if linear else eps
        before: tuple[Tensor, ...] = state.memory or ()
        v = slope if not before else (1.0 - self.beta) * before[0] + self.beta * slope
        held = (v, *before)[: self.max_order]
        weights = ghvb_weights(len(held), self.beta)
        u = sum(w * past for w, past in zip(weights, held, strict=True))
        scale_t, place_t = process.ode(t)
        scale_s, place_s = process.ode(s)
        if not before:  # finite where alpha is 0
            x = transfer(process, state.x, x0_hat, t, s)
        else:
            x = (scale_s / scale_t) * state.x + (scale_s * (place_s - place_t)) * u
        return State(x, x0_hat, held, state.step + 1)
