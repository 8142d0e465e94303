"""Closeness to a point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.registry import rewards


@rewards.register("quadratic")
@dataclass(frozen=True)
class Quadratic:
    """How close a sample is to a point, ``-sum (x - center)^2 / (2 q)``: tilting a Gaussian mixture by it is exact.

    Args:
        center: coordinate of the point, the same in every direction.
        q: width; larger is more forgiving.

    Reference: none needed; the tilted mixture follows from completing the square.
    Cost: negligible.
    """

    center: float = 1.5
    q: float = 1.0

    needs_labels = False
    cheap = True
    differentiable = True
    revision = "1"

    def __post_init__(self) -> None:
        if self.q <= 0:
            raise ValueError(f"reward.q must be above 0, got {self.q}.")

    def check(self, shape: tuple[int, ...]) -> None:
        """Any array."""

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        return -(samples.double().flatten(1) - self.center).square().sum(dim=1) / (2 * self.q)
