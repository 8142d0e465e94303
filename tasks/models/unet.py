"""Any saved diffusers UNet2DModel, from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import Checkpoint, FolderModel, digits_reference
from tasks.registry import models


@models.register("unet")
@dataclass(frozen=True)
class UNet(FolderModel):
    """A diffusers UNet2DModel from a folder written by ``save_pretrained``.

    Args:
        path: the folder: a pipeline's (with ``unet/`` and ``scheduler/``) or a UNet's own.
        scheduler: scheduler configuration (beta_schedule, beta_start, beta_end, prediction_type, …) for a folder that
            has none.
        data: "digits" judges samples by scikit-learn's digits; null leaves reference metrics unavailable.

    Reference: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (network); diffusers (format).
    """

    path: str
    scheduler: dict[str, Any] | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if self.data not in (None, "digits"):
            raise ValueError(f"model.data must be null or 'digits', got {self.data!r}.")
        _ = self.checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return Checkpoint(Path(self.path), self.scheduler)

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """The data set that samples are judged by."""
        if self.data != "digits":
            raise ValueError("model.data is null, so there is no reference data. Set model.data=digits.")
        return digits_reference()
