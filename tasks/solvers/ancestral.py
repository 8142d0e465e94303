"""Ancestral unmasking for masked diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import unmasking
from tasks.registry import solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("ancestral")
@dataclass(frozen=True)
class Ancestral:
    """Ancestral unmasking: each masked token is revealed with probability (t - s) / t, drawn from its posterior.

    Whether a token is revealed and what it becomes are two draws in float64, so no rounding of a large mask probability
    can bias the rate. Tokens of one step are drawn independently of each other, which is exact only for many steps.

    With the cache, a row is evaluated only in a step that reveals one of its tokens, and only if its tokens changed
    since the last evaluation: at most one evaluation a token, and of T steps on L tokens ``T (1 - (1 - 1/T)^L)`` on
    average. The rows are the same. A part of a batch is then evaluated at a time, so on a network, whose last bits
    depend on the number of rows of a call, that holds up to rounding. What was spent is counted; ``nfe`` is an upper
    bound.

    Args:
        cache: keep the prediction until it is needed and out of date; for models that do not look at the time.
        gumbel: null, or float32: draw token or mask at once by ``argmax(logits + Gumbel)`` in float32, as is often
            done. **Biased, for comparison only**: unlikely tokens are lost and too few masks are revealed.
        filters: specs of filters of the token probabilities, in order.

    Reference: Austin et al. 2021; Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 6,
        and the cache; Zheng et al. 2024, "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit
        Inaccurate Categorical Sampling" (the number of evaluations, and the float32 defect).
    Cost and order: one evaluation a step, fewer with the cache; first order (factorised); stochastic.
    Identities: the cache changes no row of a model that does not look at the time.
    """

    cache: bool = False
    gumbel: str | None = None
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    stochastic = True

    def __post_init__(self) -> None:
        unmasking.check_gumbel(self.gumbel)
        if self.cache and self.gumbel is not None:
            raise ValueError(
                f"solver.cache=true needs to know which tokens are revealed before they are drawn, but gumbel="
                f"{self.gumbel} draws both at once. Set one of them to its default."
            )
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    @property
    def asks_once(self) -> bool:
        """Whether every step is one evaluation of its own state."""
        return not self.cache

    @property
    def own_pace(self) -> bool:
        """Whether a step may evaluate some of the rows only."""
        return self.cache

    @property
    def saves(self) -> bool:
        """Whether fewer evaluations may be made than planned."""
        return self.cache

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step; with the cache, at most."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations; with the cache, at most so many are made."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token."""
        unmasking.check_filters(self.filters, process.vocabulary)

    def check_recipe(self, recipe: Any) -> None:
        """A cached prediction must not be out of date because time went on."""
        if self.cache and not getattr(recipe.parts.model, "ignores_time", False):
            raise ValueError(
                f"solver.cache=true keeps predictions from earlier times, but model {recipe.model['name']} looks at "
                "the time. Set solver.cache=false, or use a model that ignores it, such as table."
            )

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        rate, masked = (t - s) / t, state.x == model.process.mask
        revealed = masked & (noise.uniform(tuple(state.x.shape[1:]), purpose="reveal") < rate)
        memory = None
        if self.cache:
            memory = self._evaluated(model, state, t, revealed.any(dim=1))
            x0_hat = memory["x0_hat"]
        else:
            x0_hat = model.denoise(state.x, t)
        probabilities = unmasking.filtered(x0_hat, self.filters)
        if self.gumbel is None:
            drawn = unmasking.draw(probabilities, noise, "token")
        else:
            stays = torch.full_like(probabilities[..., :1], 1.0 - rate)
            drawn = unmasking.draw(torch.cat([rate * probabilities, stays], dim=-1), noise, "token", self.gumbel)
            revealed = masked & (drawn != model.process.mask)
        return State(torch.where(revealed, drawn, state.x), x0_hat, memory, state.step + 1)

    def _evaluated(self, model: Conditioned, state: State, t: float, needed: Tensor) -> dict[str, Tensor]:
        """The last evaluations, (B, L, V), and the states they were made at, made anew where needed and out of date."""
        kept = state.memory
        if kept is None:
            return {"x": state.x, "x0_hat": model.denoise(state.x, t)}
        rows = (needed & (kept["x"] != state.x).any(dim=1)).nonzero()[:, 0]
        if not len(rows):
            return kept
        x, x0_hat = kept["x"].clone(), kept["x0_hat"].clone()
        x[rows], x0_hat[rows] = state.x[rows], model.select(rows).denoise(state.x[rows], t)
        return {"x": x, "x0_hat": x0_hat}
