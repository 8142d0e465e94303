"""Peak signal-to-noise ratio against the reference item that the row measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks import reference_items
from tasks.registry import rewards

CEILING = 100.0  # an image that is equal to the last bit would be infinitely good


@rewards.register("recovery_psnr")
@dataclass(frozen=True)
class RecoveryPSNR:
    """Peak signal-to-noise ratio in dB of a sample against the clean item that its row measured.

    ``10 log10(peak^2 / mean (x - x_ref)^2)``, at most 100. Row i is compared with item i of the model's reference data,
    as in the reward ``measurement``.

    Args:
        model: spec of the model whose reference data was measured.
        item: compare every row with this item; null takes item i for row i.
        peak: range of the data; 2 for images in [-1, 1].

    Reference: Huynh-Thu and Ghanbari 2008, "Scope of validity of PSNR in image/video quality assessment".
    Cost: negligible.
    """

    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits"})
    item: int | None = None
    peak: float = 2.0

    needs_labels = False
    differentiable = True

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise ValueError(f"reward.peak must be positive, got {self.peak}.")
        reference_items.check_item(self.item)

    @property
    def revision(self) -> str:
        """Hash of the clean items."""
        return reference_items.revision(self.model)

    def check(self, shape: tuple[int, ...]) -> None:
        """Samples of the shape of the data."""
        reference_items.check_shape("recovery_psnr compares with", self.model, shape)

    def at(self, indices: Tensor) -> _Recovered:
        """The scorer of the rows with these indices, (B,) int64."""
        return _Recovered(reference_items.of_rows(self.model, indices, self.item), self.peak)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """Refused: the item is the row's own."""
        raise reference_items.without_rows("recovery_psnr compares row i with item i", samples)


@dataclass(frozen=True)
class _Recovered:
    clean: Tensor
    peak: float

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        error = (samples.double() - self.clean).flatten(1).square().mean(dim=1)
        return (20 * math.log10(self.peak) - 10 * torch.log10(error)).clamp(max=CEILING)
