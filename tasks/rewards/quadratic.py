"""A parabola: the reward whose tilt of a Gaussian mixture is a Gaussian mixture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.registry import rewards


@rewards.register("quadratic")
@dataclass(frozen=True)
class Quadratic:
    """Closeness to a point, ``r(x) = -sum (x - center)^2 / (2 q)``: an oracle, since its tilt has a closed form.

    Args:
        center: every element of the point.
        q: how far off costs half a nat.

    Reference: none needed; the product of Gaussians is Gaussian.
    Cost: negligible.
    """

    center: float = 1.5
    q: float = 1.0

    needs_labels = False
    revision = "1"
    differentiable = True

    def __post_init__(self) -> None:
        if not self.q > 0:
            raise ValueError(f"reward.q must be positive, got {self.q}.")

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape."""

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        return -(samples.double() - self.center).flatten(1).square().sum(dim=1) / (2 * self.q)
