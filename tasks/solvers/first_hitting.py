"""First-hitting sampling of masked diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tasks import unmasking
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("first_hitting")
@dataclass(frozen=True)
class FirstHitting:
    """First-hitting sampler: jump from one revealed token to the next, at its exact random time.

    With n masked tokens at time tau the next one is revealed at ``tau u^{1/n}``, u uniform: at a uniformly drawn masked
    place, from its posterior. As many steps as tokens give the exact law of the reverse process, with L evaluations.
    With fewer steps N, every step reveals about L / N tokens from one prediction, drawn independently of each other,
    which is an approximation. Only the number of steps of the grid counts; the model is told the row's own time.

    Args:
        tokens_per_step: tokens that a step reveals; null shares the masked tokens evenly among the steps.
        gumbel: null, or float32: draw tokens by ``argmax(logits + Gumbel)`` in float32. **Biased, for comparison
            only**: tokens 2^24 times less likely than the best never come, and rare ones too seldom.
        filters: specs of filters of the token probabilities, in order.

    Reference: Zheng et al. 2024, "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit
        Inaccurate Categorical Sampling", algorithm 1.
    Cost and order: one evaluation a step, at most L steps; exact in law with L; stochastic.
    Identities: with one token a step, equal in law to ``ancestral`` with infinitely many steps.
    """

    tokens_per_step: int | None = None
    gumbel: str | None = None
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    stochastic = True
    restarts = False  # a grid that rises again masks a random number of tokens, for which no steps are left
    own_pace = True  # asks at the row's own time

    def __post_init__(self) -> None:
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"solver.tokens_per_step must be at least 1 or null, got {self.tokens_per_step}.")
        unmasking.check_gumbel(self.gumbel)
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token, and a run to the data."""
        unmasking.check_filters(self.filters, process.vocabulary)
        if times[-1] != 0:
            raise ValueError(f"first_hitting reveals every token, so its times must end at 0, got {times[-1]}.")

    def check_recipe(self, recipe: Any) -> None:
        """No step may be left without a token."""
        length, num_steps = math.prod(recipe.parts.model.shape), len(recipe.grid[0]) - 1
        if self.tokens_per_step is not None and num_steps != -(-length // self.tokens_per_step):
            raise ValueError(
                f"{length} tokens, {self.tokens_per_step} a step, take {-(-length // self.tokens_per_step)} steps of "
                f"first_hitting, but the grid has {num_steps}. Set solver.tokens_per_step=null, or that many steps."
            )
        if num_steps > length:
            raise ValueError(
                f"first_hitting reveals at least one of {length} tokens a step, but the grid has {num_steps} steps. "
                f"Set nfe={length}, which is exact in law, or less."
            )

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """How many steps there will be."""
        return {"left": len(times) - 1, "tau": None}

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """The next tokens of every row."""
        left, tau = state.memory["left"], state.memory["tau"]
        if tau is None:
            tau = torch.full((len(state.x),), t, dtype=torch.float64, device=state.x.device)
        x0_hat = model.denoise(state.x, tau)
        masked = state.x == model.process.mask
        count = masked.sum(1)
        quota = -(-count // left) if self.tokens_per_step is None else count.clamp(max=self.tokens_per_step)
        length = state.x.shape[1]
        places = unmasking.choose(noise.uniform((length,), purpose="place"), masked, quota)
        # Only what is revealed is drawn: the chosen places come first, (B, M).
        most = max(int(quota.max()), 1)
        where = places.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        chosen = places.gather(1, where)
        probabilities = x0_hat.gather(1, where[..., None].expand(-1, -1, x0_hat.shape[-1]))
        drawn = unmasking.draw(unmasking.filtered(probabilities, self.filters), noise, "token", self.gumbel)
        x = state.x.scatter(1, where, torch.where(chosen, drawn, state.x.gather(1, where)))
        # tau falls by a factor u^{1/n} for each, while n falls with it.
        order = torch.arange(most, device=x.device)
        shares = noise.uniform((most,), purpose="time").log() / (count[:, None] - order).clamp(min=1)
        tau = tau * torch.where(order < quota[:, None], shares, 0.0).sum(1).exp()
        return State(x, x0_hat, {"left": max(left - 1, 1), "tau": tau}, state.step + 1)
