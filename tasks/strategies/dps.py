"""Diffusion posterior sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tasks import guided_step
from tasks.account import Account
from tasks.registry import strategies
from tasks.types import Noise, Samples


@strategies.register("dps")
@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling: every step also moves against the gradient of the predicted misfit; biased.

    ``x_s <- step(x_t) - zeta grad_{x_t} ||y - A x0_hat(x_t)||``: the norm, not its square, and of every row by itself
    (one norm over a batch would couple its rows and make zeta depend on its size). The likelihood of x_t is replaced by
    that of the mean of x_0, so the samples are *not* draws from the posterior (at zeta 0.1 to 0.3 they are too narrow).
    It is a baseline for restoration, and ``afdps`` is the sampler.

    Args:
        zeta: step size; 0.3 to 1 in the paper, at 1000 steps. Fewer steps need more.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Chung et al. 2023, "Diffusion Posterior Sampling for General Noisy Inverse Problems", algorithm 1.
    Cost: the solver's evaluations and a backward pass through the network for each; no reward calls (A is known).
    Identities: with zeta=0 this is ``single``, draw for draw.
    """

    zeta: float = 0.5
    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    uses_reward = True
    branches = False
    semantics = "sample"
    bias = "the likelihood of a noisy state is that of its prediction"

    def __post_init__(self) -> None:
        if not self.zeta >= 0:
            raise ValueError(f"strategy.zeta must be at least 0, got {self.zeta}.")

    def check_recipe(self, recipe: Any) -> None:
        """A measurement, and predictions that can be differentiated."""
        guided_step.check_recipe(recipe)

    def account(self, evaluations: Sequence[int]) -> Account:
        """Every evaluation has a backward pass."""
        return Account(nfe=sum(evaluations), gradients=sum(evaluations))

    def __call__(self, sampler: Any, reward: Any, noise: Noise) -> Samples:
        """(B, *shape) samples with the column ``misfit`` (B,), the last norm of the residual."""
        measured = reward.at(noise.indices).scorer
        state = sampler.start(noise)
        for _ in range(sampler.num_steps):
            state, gradient = guided_step.step_with_gradient(
                sampler, state, noise, lambda x0: torch.linalg.vector_norm(measured.residual(x0), dim=1)
            )
            state = replace(state, x=state.x - self.zeta * gradient)
        return Samples(state.x, {"misfit": torch.linalg.vector_norm(measured.residual(state.x), dim=1)})
