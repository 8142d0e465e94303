"""Mean intensity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.registry import rewards


@rewards.register("ink")
@dataclass(frozen=True)
class Ink:
    """Mean intensity of an image, 0 for black and 1 for white: a reward that anybody can check by eye.

    Reference: none needed.
    Cost: negligible.
    """

    needs_labels = False
    cheap = True
    differentiable = True
    revision = "1"

    def check(self, shape: tuple[int, ...]) -> None:
        """Any array in [-1, 1]."""

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,)."""
        return (samples.float().flatten(1).mean(dim=1) + 1) / 2
