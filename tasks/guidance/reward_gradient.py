"""Guidance by the gradient of a reward."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tasks.processes import expand
from tasks.prompted import reading, texts_of
from tasks.registry import Spec, guidance, rewards
from tasks.types import Model, sample_shape


@guidance.register("reward_gradient")
@dataclass(frozen=True)
class RewardGradient:
    """Reward-gradient guidance: ``x0 = x0_hat + scale (sigma^2 / alpha) grad_x r(x0_hat(x))``.

    The score of the data tilted by ``exp(scale r)`` is the model's plus ``grad_x log E[exp(scale r(x_0)) | x_t = x]``;
    the expectation is replaced by the reward of the mean. That is exact for a linear reward of Gaussian data with
    shared covariance and biased elsewhere: for a quadratic reward of width q it overestimates the gradient by
    ``1 + scale v / q`` where v is the posterior variance, so the pull is too strong early on. Where alpha is 0 nothing
    is guided. The reward sees the clean prediction itself, before it is clamped by decoding; of latents it sees the
    decoded picture, and the gradient goes back through the decoder. Rewards that read prompts are given the row's.

    Args:
        scale: strength; 0 leaves the gradient out and is the model itself.
        reward: spec of a differentiable reward.

    Reference: Chung et al. 2023, "Diffusion Posterior Sampling", eq. 11 (reward of the mean); Bansal et al. 2023,
        "Universal Guidance for Diffusion Models", eq. 6.
    Cost: no further evaluations, but a backward pass through each, and a call of the reward a step; of latents a call
        of the decoder too.
    Identities: with scale=0 the model itself; exact on a Gaussian with a linear reward.
    """

    scale: float = 1.0
    reward: dict[str, Any] = field(default_factory=lambda: {"name": "ink"})

    evaluations = 1
    decodes = False  # whether the model's states are decoded before the reward sees them

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", rewards.complete(self.reward))

    @cached_property
    def scorer(self) -> Any:
        """The reward."""
        return rewards.build(self.reward)

    def beside(self, model: Any) -> RewardGradient:
        """Itself with a reward that knows the model's prompts."""
        found = copy.copy(self)
        found.__dict__["scorer"] = reading(self.scorer, texts_of(model))
        found.__dict__["decodes"] = bool(self.scale) and sample_shape(model) != tuple(model.shape)
        return found

    @property
    def needs_labels(self) -> bool:
        """Whether the reward does."""
        return self.scorer.needs_labels

    @property
    def differentiates(self) -> bool:
        """Whether every evaluation has a backward pass."""
        return self.scale != 0.0

    @property
    def revision(self) -> str:
        """That of the reward, which determines the rows too."""
        return self.scorer.revision

    def check_recipe(self, recipe: Any) -> None:
        """Refuse rewards and models without gradients.

        Raises:
            ValueError: says which.
        """
        name: Spec = self.reward["name"]
        if not getattr(self.scorer, "differentiable", False):
            fitting = [n for n in rewards.names() if getattr(rewards.get(n), "differentiable", False) is True]
            raise ValueError(f"reward {name} passes no gradients to its samples. Use one of: {', '.join(fitting)}.")
        if hasattr(self.scorer, "at"):
            raise ValueError(
                f"reward {name} depends on the row, which guidance does not know. Use strategy=dps for measurements."
            )
        if not getattr(self.scorer, "scores_predictions", True):
            raise ValueError(f"reward {name} makes no sense of unfinished samples. Use another one.")
        if recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(f"guidance reward_gradient needs a Gaussian model, but {recipe.model['name']} is not.")
        self.scorer.check(sample_shape(recipe.parts.model))

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: RewardGradient) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        if not self._spec.scale:
            return self._model.denoise(x, t, cond)
        if getattr(self._model, "is_rehearsal", False):
            found = self._model.denoise(x, t, cond)
            return self._model.decode(found, cond) if self._spec.decodes else found
        outer = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            seen = x if outer else x.detach().requires_grad_()
            found = self._model.denoise(seen, t, cond)
            seen_by_reward = self._model.decode(found, cond) if self._spec.decodes else found
            value = self._spec.scorer(seen_by_reward, cond).sum()
            (gradient,) = torch.autograd.grad(value, seen, create_graph=outer, retain_graph=outer)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        weight = torch.as_tensor(self._spec.scale * sigma**2 / alpha if not _zero(alpha) else 0.0)
        weight = torch.where(torch.isfinite(weight), weight, torch.zeros_like(weight))
        shifted = found + (expand(weight, x) if weight.ndim else float(weight)) * gradient
        return shifted if outer else shifted.detach()


def _zero(alpha: Any) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 0.0
