"""Ancestral unmasking for masked diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tasks.processes import categorical
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("ancestral")
@dataclass(frozen=True)
class Ancestral:
    """Ancestral unmasking: each masked token is revealed with probability (t - s) / t, drawn from its posterior.

    Whether a token is revealed and what it becomes are two draws in float64, so no rounding of a large mask probability
    can bias the rate. Tokens of one step are drawn independently of each other, which is exact only for many steps.

    Reference: Austin et al. 2021; Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 6.
    Cost and order: one evaluation a step; first order (factorised); stochastic.
    """

    process = "masked"
    order = 1
    stochastic = True
    asks_once = True

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        shape = tuple(state.x.shape[1:])
        x0_hat = model.denoise(state.x, t)
        masked = state.x == model.process.mask
        revealed = masked & (noise.uniform(shape, purpose="reveal") < (t - s) / t)
        tokens = categorical(x0_hat, noise.uniform(shape, purpose="token"))
        return State(torch.where(revealed, tokens, state.x), x0_hat, None, state.step + 1)
