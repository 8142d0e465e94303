"""Token strings that keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks import apart
from tasks.account import Account
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples

FEATURES = ("pooled", "places")


@strategies.register("token_repulsion")
@dataclass(frozen=True)
class TokenRepulsion:
    """Orthogonal repulsion (ODD): K strings of a row, each pushed away from those before it; the best is returned.

    In every prediction, string k has the unit feature vector f_k of its token probabilities (1 for a token that is
    fixed). With u_k the unit part of f_k that is orthogonal to f_1 .. f_{k-1} (held fixed) and q_k the mean largest
    probability of its masked places, the logits of masked places move by ``alpha t g / max_l |g_l|``, where g is the
    gradient of ``<f_k, u_k> q_k`` and g_l its part at place l: towards what the others do not have, as far as the model
    is sure of it, strongly among the masks and not at all at the data. A token of probability 0 keeps it.

    **Biased** after the first string, and strings of a row depend on each other: a row is one unit for any estimate
    over samples, and pass@k over the strings of one row is not the estimator for independent ones.

    Args:
        particles: strings K of a row, in a fixed order.
        alpha: the largest shift of a token's logits (its Euclidean length) at t = 1; published between 8 and 64.
        features: pooled (for every token its largest probability over the string, V numbers, as published) or places
            (the probabilities of all places, L V numbers, for strings whose places differ in meaning, such as pixels).
        pick: the string to return; null returns the one with the largest reward.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Lamont et al. 2026, "Free Lunch for Pass@k? Low Cost Diverse Sampling for Diffusion Language Models". Its
        factor 1 - i / N is t here, the same on a uniform grid.
    Cost: K trajectories; K reward calls unless ``pick`` is given. Gradients do not go through the network.
    Identities: string 0 is ``single``, draw for draw; with alpha=0 this is ``best_of_n``.
    """

    particles: int = 8
    alpha: float = 16.0
    features: str = "pooled"
    pick: int | None = None
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    intermediate = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise unknown("features", self.features, list(FEATURES), "Allowed")
        if self.particles < 1 or self.alpha < 0:
            raise ValueError(
                f"token_repulsion needs particles >= 1 and alpha >= 0, got {self.particles} and {self.alpha}."
            )
        if self.pick is not None and not 0 <= self.pick < self.particles:
            raise ValueError(f"strategy.pick must be between 0 and {self.particles - 1}, got {self.pick}.")

    @property
    def uses_reward(self) -> bool:
        """Where there is a choice to make."""
        return self.particles > 1 and self.pick is None

    def check_recipe(self, recipe: Any) -> None:
        """Tokens, and a solver that evaluates all strings at once."""
        p = recipe.parts
        if p.model.noising.kind != "masked":
            raise ValueError(
                f"strategy token_repulsion moves the logits of tokens, but model {recipe.model['name']} is "
                f"{p.model.noising.kind}. Use strategy=repulsion, or a token model."
            )
        if getattr(p.solver, "saves", False):
            raise ValueError(
                f"strategy token_repulsion compares all strings of a row at every step, but solver "
                f"{recipe.solver['name']} evaluates only some of them. Set solver.cache=false."
            )

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories."""
        calls = self.particles if self.uses_reward else 0
        return Account(self.particles * sum(evaluations), calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``spread`` (B,), mean distance of a row's strings; with a reward ``candidate_rewards``, ``slot``."""
        if self.particles == 1:
            return Samples(sampler.run(noise).x)
        wide = replace(sampler.repeat(self.particles), model=_Repelled(sampler.model, self))
        return apart.chosen(wide, reward if self.uses_reward else None, noise, self.particles, self.pick)

    def push(self, x: Tensor, p: Tensor, t: float | Tensor) -> Tensor:
        """The probabilities of rows of K strings, moved apart; (B K, L) states, (B K, L, V) to (B K, L, V) float64."""
        masked = x == p.shape[-1]
        logs = torch.log(p.double())
        with torch.enable_grad():
            z = logs.clamp(min=-700.0).requires_grad_()  # the gradient at -inf is nan, and at e^-700 it is nothing
            soft = torch.where(masked[..., None], torch.softmax(z, dim=-1), p.double())
            raw = soft.amax(dim=1) if self.features == "pooled" else soft.flatten(1)
            unit = raw / raw.norm(dim=1, keepdim=True)
            outward = apart.residuals(unit.detach().view(-1, self.particles, unit.shape[1])).flatten(0, 1)
            sure = torch.where(masked, soft.amax(dim=-1), 0.0).sum(1) / masked.sum(1).clamp(min=1)
            (gradient,) = torch.autograd.grad(((unit * outward).sum(1) * sure).sum(), z)
        largest = gradient.norm(dim=-1).amax(dim=1)[:, None, None]
        time = t.double().view(-1, 1, 1) if isinstance(t, Tensor) else t
        moved = torch.softmax(logs + self.alpha * time * gradient / largest.clamp_min(1e-300), dim=-1)
        first = torch.arange(len(x), device=x.device) % self.particles == 0
        # What does not move stays to the last bit: first strings, fixed tokens, strings with nowhere to go.
        moves = masked[..., None] & (largest > 1e-12) & ~first[:, None, None] & (self.alpha > 0)
        return torch.where(moves, moved, p.double())


class _Repelled:
    """A model whose predictions of the strings of a row keep apart."""

    def __init__(self, model: Any, spec: TokenRepulsion) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None) -> Tensor:
        return self._spec.push(x, self._model.denoise(x, t, cond), t)
