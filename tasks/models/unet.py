"""Any saved diffusers UNet2DModel, from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import Checkpoint, FolderModel, digits_reference
from tasks.image_data import JudgedByPictures
from tasks.pipelines.family import StockSchedule
from tasks.registry import models


@models.register("unet")
@dataclass(frozen=True)
class UNet(JudgedByPictures, FolderModel):
    """A diffusers UNet2DModel from a folder written by ``save_pretrained``.

    Args:
        path: the folder: a pipeline's (with ``unet/`` and ``scheduler/``) or a UNet's own.
        scheduler: scheduler configuration (beta_schedule, beta_start, beta_end, prediction_type, …) for a folder that
            has none.
        data: pictures that samples are compared with: a folder, .npz, .npy or .parquet (``tasks/image_data.py``), or
            the word digits for scikit-learn's.

    Reference: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (network); diffusers (format).
    """

    path: str
    scheduler: dict[str, Any] | None = None
    data: str | None = None

    unkeyed = ("path", "data")  # the revision holds the content; data changes no row

    def __post_init__(self) -> None:
        _ = self.checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return Checkpoint(Path(self.path), self.scheduler)

    @property
    def stock_schedule(self) -> StockSchedule:
        """How the stock pipeline sets up its scheduler."""
        return StockSchedule(self.checkpoint.scheduler)

    def check_data(self) -> None:
        """Refuse a model without data, or with data that cannot be read."""
        if self.data != "digits":
            super().check_data()

    @property
    def data_identity(self) -> str | None:
        """Of the pictures; None without any."""
        return "digits" if self.data == "digits" else super().data_identity

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """The pictures, (N, C, H, W), and their labels."""
        return digits_reference() if self.data == "digits" else super().reference(count)
