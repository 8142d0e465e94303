"""The embedded diffusion transformer of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import WEIGHTS, Checkpoint, FolderModel, digits_reference
from tasks.registry import models


@models.register("digits_dit")
@dataclass(frozen=True)
class DigitsDiT(FolderModel):
    """The embedded class-conditional eps-prediction DiT of 8x8 handwritten digits (``solvus train digits_dit``).

    Sixteen patches of 2x2 pixels and six blocks: a transformer on which caches, early exits and regions can be tried.

    Args:
        path: another folder with a diffusers DiTTransformer2DModel; null takes the one that comes with Solvus.

    Reference: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"; Ho and Salimans 2022 (label
        dropout).
    """

    path: str | None = None

    def __post_init__(self) -> None:
        _ = self.checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        folder = Path(self.path) if self.path else WEIGHTS / "digits_dit"
        return Checkpoint(folder, kind="DiTTransformer2DModel")

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()
