"""Particles that keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks import apart, classifier
from tasks.account import Account
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples, sample_shape

FEATURES = ("identity", "classifier")


@strategies.register("repulsion")
@dataclass(frozen=True)
class Repulsion:
    """K particles of a row, each pushed away from those before it while they are denoised; the best is returned.

    In every prediction, particle k moves along the gradient of ``<f_k, u_k>``, where f_k is the unit feature vector of
    its clean prediction and u_k the unit part of f_k that is orthogonal to f_1 .. f_{k-1} (held fixed). The step has
    length ``alpha t |x0_hat| / sqrt(K)``: strong among the noise, nothing at the data. The particles are no longer
    independent, so a row is one unit for any estimate over samples.

    Args:
        particles: particles K of a row, in a fixed order.
        alpha: strength of the repulsion, relative to the length of a prediction.
        features: identity (the prediction itself) or classifier (the embedded digit classifier's 64 activations).
        pick: the particle to return; null returns the one with the largest reward.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Lamont et al. 2026, "Free Lunch for Pass@k? Low Cost Diverse Sampling for Diffusion Language Models".
        That is for tokens, and strategy token_repulsion; here, its continuous counterpart, the gradient acts on clean
        predictions instead of logits.
    Cost: K trajectories; K reward calls unless ``pick`` is given. Gradients go through the features only.
    Identities: particle 0 is ``single``; with alpha=0 this is ``best_of_n``.
    """

    particles: int = 4
    alpha: float = 0.2
    features: str = "identity"
    pick: int | None = None
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    intermediate = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise unknown("features", self.features, list(FEATURES), "Allowed")
        if self.particles < 1 or self.alpha < 0:
            raise ValueError(f"repulsion needs particles >= 1 and alpha >= 0, got {self.particles} and {self.alpha}.")
        if self.pick is not None and not 0 <= self.pick < self.particles:
            raise ValueError(f"strategy.pick must be between 0 and {self.particles - 1}, got {self.pick}.")

    @property
    def uses_reward(self) -> bool:
        """Where there is a choice to make."""
        return self.particles > 1 and self.pick is None

    def check_recipe(self, recipe: Any) -> None:
        """Gaussian models, and digits for the classifier."""
        if recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(
                f"strategy repulsion moves clean predictions in space, but model {recipe.model['name']} is "
                f"{recipe.parts.model.noising.kind}. Use token_repulsion for tokens, or a Gaussian model."
            )
        if self.features == "classifier":
            classifier.refuse_other_shapes(sample_shape(recipe.parts.model), "strategy.features=classifier")

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories."""
        calls = self.particles if self.uses_reward else 0
        return Account(self.particles * sum(evaluations), calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``spread`` (B,), mean distance of a row's samples; with a reward ``candidate_rewards``, ``slot``."""
        if self.particles == 1:
            return Samples(sampler.run(noise).x)
        wide = sampler.repeat(self.particles)
        wide = replace(wide, model=_Repelled(sampler.model, self))
        return apart.chosen(wide, reward if self.uses_reward else None, noise, self.particles, self.pick)

    def push(self, x0_hat: Tensor, t: Any) -> Tensor:
        """The predictions of rows of K particles, moved apart; (B K, *shape)."""
        with torch.enable_grad():
            leaf = x0_hat.detach().requires_grad_()
            raw = leaf if self.features == "identity" else classifier.load(str(leaf.device)).features(leaf.float())
            wide = raw.flatten(1).double()
            unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
            outward = apart.residuals(unit.detach().view(-1, self.particles, unit.shape[1])).flatten(0, 1)
            (gradient,) = torch.autograd.grad((unit * outward).sum(), leaf)
        size = gradient.flatten(1).double().norm(dim=1)
        length = self.alpha * x0_hat.flatten(1).double().norm(dim=1) / self.particles**0.5
        scale = torch.where(size > 1e-9, length / size.clamp_min(1e-9), 0.0).to(x0_hat.dtype)
        time = t.to(x0_hat.dtype).view(-1, *[1] * (x0_hat.dim() - 1)) if isinstance(t, Tensor) else t
        pushed = x0_hat + time * scale.view(-1, *[1] * (x0_hat.dim() - 1)) * gradient.to(x0_hat.dtype)
        first = torch.arange(len(x0_hat), device=x0_hat.device) % self.particles == 0
        return torch.where(first.view(-1, *[1] * (x0_hat.dim() - 1)), x0_hat, pushed)


class _Repelled:
    """A model whose predictions of the particles of a row keep apart."""

    def __init__(self, model: Any, spec: Repulsion) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None) -> Tensor:
        return self._spec.push(self._model.denoise(x, t, cond), t)
