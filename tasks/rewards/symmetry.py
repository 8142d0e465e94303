"""Left-right symmetry of an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.registry import rewards


@rewards.register("symmetry")
@dataclass(frozen=True)
class Symmetry:
    """Left-right symmetry: minus the mean squared difference between an image and its mirror image, at most 0.

    Reference: none needed.
    Cost: negligible.
    """

    needs_labels = False
    cheap = True
    differentiable = True
    passing = -0.2  # one plain digit in six is as symmetric
    revision = "1"

    def check(self, shape: tuple[int, ...]) -> None:
        """Images, or vectors, which are mirrored as one line."""
        if shape[-1] < 2:
            raise ValueError(
                f"symmetry compares a sample with its mirror image, but rows of {tuple(shape)} have 1 pixel."
            )

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        samples = samples.double()
        return -(samples - samples.flip(-1)).square().flatten(1).mean(dim=1)
