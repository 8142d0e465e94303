"""Log-likelihood of noisy products of neighbouring tokens: a measurement that is not linear."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tasks import reference_items
from tasks.registry import models, rewards
from tasks.types import sample_shape


@rewards.register("neighbour_products")
@dataclass(frozen=True)
class NeighbourProducts:
    """Log-likelihood of noisy products of neighbours along a string, measured of the row's own reference item.

    ``r(x) = log N(y; (x_1 x_2, x_2 x_3, …), sigma_y^2 I)`` with y made of item i of the model's reference data in row i
    (over again after the last), or given. The elements of a sample, flattened, are its string. It tells apart what no
    linear measurement of the mean of x can: a product is 0 if either factor is.

    Args:
        sigma_y: standard deviation of the measurement's noise.
        model: spec of the model whose reference data is measured.
        item: measure this item in every row, once; null takes item i in row i.
        y: a measurement of your own, the same for all rows, one number less than the string is long.
        seed: seed of the noise.

    Reference: none needed.
    Cost: one product an element.
    """

    sigma_y: float = 0.5
    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits"})
    item: int | None = None
    y: tuple[float, ...] | None = None
    seed: int = 0

    needs_labels = False
    differentiable = True

    def __post_init__(self) -> None:
        reference_items.check_measuring(self)
        self.check(sample_shape(models.build(self.model)))

    @property
    def revision(self) -> str:
        """Hash of what is measured."""
        return "1" if self.y is not None else reference_items.revision(self.model)

    def check(self, shape: tuple[int, ...]) -> None:
        """Samples of the shape that is measured, with at least two elements."""
        known = reference_items.check_shape("neighbour_products measures", self.model, shape)
        size = math.prod(known) - 1
        if size < 1 or (self.y is not None and len(self.y) != size):
            raise ValueError(f"reward.y must be {size} products of neighbours, at least one, got {self.y}.")

    def at(self, indices: Tensor) -> ProductsOfRows:
        """The scorer of the rows with these indices, (B,) int64."""
        size = math.prod(sample_shape(models.build(self.model))) - 1
        return ProductsOfRows(reference_items.measured(self, indices, size, products), self.sigma_y)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """Refused: the measurement is the row's own."""
        raise reference_items.without_rows("neighbour_products scores row i against the measurement of row i", samples)


@dataclass(frozen=True)
class ProductsOfRows:
    """The measurements y of some rows, (B, M) float64; called as a scorer it gives r in nats, (B,) float64."""

    y: Tensor
    sigma_y: float

    def __call__(self, samples: Tensor, cond: Tensor | None = None) -> Tensor:
        """r(x)."""
        squares = ((self.y - products(samples)) / self.sigma_y).square().sum(1)
        return -0.5 * squares - 0.5 * self.y.shape[1] * math.log(2 * math.pi * self.sigma_y**2)


def products(x: Tensor) -> Tensor:
    """Products of neighbours, (B, *shape) to (B, M - 1) float64."""
    flat = x.double().flatten(1)
    return flat[:, 1:] * flat[:, :-1]
