"""Log-likelihood of noisy products of neighbouring tokens: a measurement that is not linear."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.noise import RowNoise
from tasks.recipe import canonical, digest
from tasks.reference_items import items
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
        if not self.sigma_y > 0:
            raise ValueError(f"reward.sigma_y must be positive, got {self.sigma_y}.")
        if self.item is not None and self.item < 0:
            raise ValueError(f"reward.item must be at least 0, got {self.item}.")
        self.check(sample_shape(models.build(self.model)))

    @property
    def revision(self) -> str:
        """Hash of what is measured."""
        if self.y is not None:
            return "1"
        return digest(["1", hashlib.sha256(items(canonical(self.model)).tobytes()).hexdigest()])[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """Samples of the shape that is measured, with at least two elements."""
        known = sample_shape(models.build(self.model))
        if tuple(shape) != known:
            raise ValueError(
                f"neighbour_products measures data of model {self.model['name']}, of shape {known}, but the samples "
                f"have shape {tuple(shape)}. Set reward.model to the model of the study."
            )
        size = math.prod(known) - 1
        if size < 1 or (self.y is not None and len(self.y) != size):
            raise ValueError(f"reward.y must be {size} products of neighbours, at least one, got {self.y}.")

    def at(self, indices: Tensor) -> ProductsOfRows:
        """The scorer of the rows with these indices, (B,) int64."""
        size = math.prod(sample_shape(models.build(self.model))) - 1
        if self.y is not None:
            given = torch.tensor(self.y, dtype=torch.float64, device=indices.device)
            return ProductsOfRows(given.expand(len(indices), -1), self.sigma_y)
        known = items(canonical(self.model))
        measured = indices if self.item is None else torch.full_like(indices, self.item)
        clean = torch.from_numpy(known[(measured % len(known)).cpu().numpy()]).to(indices.device)
        noise = RowNoise(self.seed, measured, dtype=torch.float64).normal((size,), "measurement")
        return ProductsOfRows(products(clean) + self.sigma_y * noise, self.sigma_y)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """Refused: the measurement is the row's own."""
        raise ValueError(
            f"neighbour_products scores row i against the measurement of row i, but it was given {len(samples)} "
            "samples without their rows. Call .at(indices) first."
        )


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
