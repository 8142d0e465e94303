"""The embedded diffusion model of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import WEIGHTS, Checkpoint, FolderModel, digits_reference
from tasks.registry import models


@models.register("digits")
@dataclass(frozen=True)
class Digits(FolderModel):
    """The embedded class-conditional eps-prediction UNet of 8x8 handwritten digits (``solvus train digits``).

    Args:
        path: another folder with the same kind of model; null takes the one that comes with Solvus.

    Reference: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Ho and Salimans 2022 (label dropout).
    """

    path: str | None = None

    def __post_init__(self) -> None:
        _ = self.checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return Checkpoint(Path(self.path) if self.path else WEIGHTS / "digits")

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()
