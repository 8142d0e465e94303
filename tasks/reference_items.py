"""The clean items of a model's reference data, one for every row: what inverse problems measure.

Row i belongs to item i, over again after the last, or all rows to one item. What a reward measures of a row's item has
noise keyed by (seed, number of the item before they begin again). So the problem of a row is a function of its index,
and the same for every solver, strategy and seed of the study.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tasks.noise import RowNoise
from tasks.recipe import canonical, digest
from tasks.registry import models
from tasks.types import sample_shape


class Measuring(Protocol):
    """A reward that judges a row by a noisy measurement of the row's own item.

    Attributes:
        sigma_y: standard deviation of the measurement's noise.
        model: spec of the model whose reference data is measured.
        item: the item that all rows measure, or None.
        y: a measurement that was given for all rows, or None.
        seed: seed of the noise.
    """

    @property
    def sigma_y(self) -> float: ...
    @property
    def model(self) -> dict[str, Any]: ...
    @property
    def item(self) -> int | None: ...
    @property
    def y(self) -> tuple[float, ...] | None: ...
    @property
    def seed(self) -> int: ...


@lru_cache(maxsize=4)
def items(spec: str) -> np.ndarray:
    """The items of the model that a canonical spec names, (N, *shape) float64.

    Raises:
        ValueError: the model knows no data.
    """
    model = models.build(json.loads(spec))
    if not hasattr(model, "reference"):
        raise ValueError(f"model {model.name} has no reference data to measure. Choose a model that has.")
    found = np.asarray(model.reference()[0], dtype=np.float64)
    return found.reshape(-1, *sample_shape(model))


def revision(model: dict[str, Any]) -> str:
    """Hash of the items of a model, which a reward that reads them depends on."""
    return digest(["1", hashlib.sha256(items(canonical(model)).tobytes()).hexdigest()])[:16]


def numbers(indices: Tensor, item: int | None) -> Tensor:
    """Which item each row has before they begin again, (B,) int64."""
    return indices if item is None else torch.full_like(indices, item)


def of_rows(model: dict[str, Any], indices: Tensor, item: int | None) -> Tensor:
    """The items of the rows with these indices, (B, *shape) float64, where the indices are."""
    known = items(canonical(model))
    return torch.from_numpy(known[(numbers(indices, item) % len(known)).cpu().numpy()]).to(indices.device)


def measured(reward: Measuring, indices: Tensor, size: int, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """What a reward measured of the rows with these indices, (B, M) float64: ``y = measure(x_ref) + sigma_y e``.

    Args:
        reward: its fields; a measurement that was given is that of every row.
        indices: (B,) int64.
        size: M.
        measure: (B, *shape) float64 to (B, M) float64.
    """
    if reward.y is not None:
        return torch.tensor(reward.y, dtype=torch.float64, device=indices.device).expand(len(indices), -1)
    clean = of_rows(reward.model, indices, reward.item)
    noise = RowNoise(reward.seed, numbers(indices, reward.item), dtype=torch.float64).normal((size,), "measurement")
    return measure(clean) + reward.sigma_y * noise


# --- refusals --------------------------------------------------------------------------------------------------------


def check_item(item: int | None) -> None:
    """Refuse an item that no data has."""
    if item is not None and item < 0:
        raise ValueError(f"reward.item must be at least 0, got {item}.")


def check_measuring(reward: Measuring) -> None:
    """Refuse a measurement without noise, or of an item that no data has."""
    if not reward.sigma_y > 0:
        raise ValueError(f"reward.sigma_y must be positive, got {reward.sigma_y}.")
    check_item(reward.item)


def check_shape(reads: str, model: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a model's items, which must be that of the samples.

    Args:
        reads: who reads them, and for what, as the message begins: "measurement measures".
        model: spec of the model.
        shape: of the samples.
    """
    known = sample_shape(models.build(model))
    if tuple(shape) != known:
        raise ValueError(
            f"{reads} data of model {model['name']}, of shape {known}, but the samples have shape {tuple(shape)}. Set "
            "reward.model to the model of the study."
        )
    return known


def without_rows(judges: str, samples: Tensor) -> ValueError:
    """The refusal of samples whose rows are not known; the message begins with who judges them by what."""
    return ValueError(f"{judges}, but it was given {len(samples)} samples without their rows. Call .at(indices) first.")
