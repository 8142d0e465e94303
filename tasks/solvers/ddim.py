"""DDIM, from deterministic to ancestral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.kernels import ddim
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("ddim")
@dataclass(frozen=True)
class DDIM:
    """DDIM: jump to the predicted clean sample, then back to noise level s along the predicted noise.

    ``x_s = alpha_s x0_hat + sqrt(sigma_s^2 - nu^2) eps_hat + nu z`` with
    ``nu = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)``.

    Args:
        eta: 0 is deterministic, 1 is ancestral sampling (DDPM with the posterior variance).

    Reference: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16.
    Cost and order: one evaluation a step; first order; stochastic for eta > 0.
    Identities: with eta=0 this is exactly Euler.
    """

    eta: float = 0.0

    process = "gaussian"
    order = 1
    asks_once = True

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

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = model.denoise(state.x, t)
        x, nu = ddim(model.process, state.x, x0_hat, t, s, self.eta)
        if nu > 0:
            x = x + nu * noise.normal(tuple(x.shape[1:]), purpose="step")
        return State(x, x0_hat, None, state.step + 1)

    def kernel(self, process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        """Mean and standard deviation of x_s given x_t = x and its clean prediction."""
        return ddim(process, x, x0_hat, t, s, self.eta)
