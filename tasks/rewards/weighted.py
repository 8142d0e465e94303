"""Several rewards at once."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from torch import Tensor

from tasks import registry
from tasks.prompted import reading
from tasks.registry import rewards


@rewards.register("weighted")
@dataclass(frozen=True)
class Weighted:
    """A weighted sum of rewards, ``sum_j weights_j r_j(x)``.

    Args:
        rewards: specs of the rewards, ``[{name: ink}, {name: symmetry}]``.
        weights: one number a reward; negative ones ask for less of it.

    Where some of them depend on the row or its prompt, so does the sum.

    Reference: none needed. To compare scales first, ``solvus`` keeps every reward as a column of its own.
    Cost: that of its rewards.
    """

    rewards: tuple[dict[str, Any], ...] = ({"name": "ink"}, {"name": "symmetry"})
    weights: tuple[float, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not self.rewards or len(self.rewards) != len(self.weights):
            raise ValueError(
                f"weighted needs one weight a reward, got {len(self.weights)} weights and {len(self.rewards)} rewards. "
                "Set reward.weights."
            )
        _ = self.parts  # refuses unknown names and fields when planning

    @cached_property
    def parts(self) -> tuple[Any, ...]:
        """The reward objects."""
        return tuple(registry.rewards.build(spec) for spec in self.rewards)

    @property
    def needs_labels(self) -> bool:
        """Whether any of them does."""
        return any(part.needs_labels for part in self.parts)

    @property
    def cheap(self) -> bool:
        """Whether all of them cost next to nothing."""
        return all(getattr(part, "cheap", False) for part in self.parts)

    @property
    def differentiable(self) -> bool:
        """Whether all of them are."""
        return all(getattr(part, "differentiable", False) for part in self.parts)

    @property
    def scores_predictions(self) -> bool:
        """Whether all of them can judge a noisy prediction."""
        return all(getattr(part, "scores_predictions", True) for part in self.parts)

    @property
    def revision(self) -> str:
        """Those of its rewards."""
        return "+".join(part.revision for part in self.parts)

    def check(self, shape: tuple[int, ...]) -> None:
        """Shapes that all of them can score."""
        for part in self.parts:
            part.check(shape)

    def reading(self, texts: tuple[str, ...]) -> Self:
        """The same rewards with the model's prompts at hand."""
        made = copy(self)
        made.__dict__["parts"] = tuple(reading(part, texts) for part in self.parts)
        return made

    @property
    def by_prompt(self) -> bool:
        """Whether nothing but its prompt is what its rewards need to know of a row."""
        return all(getattr(part, "by_prompt", False) for part in self.parts if hasattr(part, "at"))

    @property
    def at(self) -> Callable[[Tensor], Weighted]:
        """(B,) int64 sample indices -> the scorer of these rows."""
        if not any(hasattr(part, "at") for part in self.parts):
            raise AttributeError("at")
        return self._at

    def _at(self, indices: Tensor) -> Weighted:
        made = copy(self)
        made.__dict__["parts"] = tuple(part.at(indices) if hasattr(part, "at") else part for part in self.parts)
        return made

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        values = [w * part(samples, cond).double() for w, part in zip(self.weights, self.parts, strict=True)]
        return sum(values[1:], values[0])
