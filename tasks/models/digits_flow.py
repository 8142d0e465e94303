"""The embedded flow-matching model of handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import WEIGHTS, Checkpoint, FolderModel, digits_reference
from tasks.registry import models


@models.register("digits_flow")
@dataclass(frozen=True)
class DigitsFlow(FolderModel):
    """The embedded class-conditional flow-matching UNet of 8x8 handwritten digits (``solvus train digits_flow``).

    Args:
        path: another folder with the same kind of model; null takes the one that comes with Solvus.

    Reference: Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022, "Flow Matching for Generative Modeling".
    """

    path: str | None = None

    def __post_init__(self) -> None:
        _ = self.checkpoint

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return Checkpoint(Path(self.path) if self.path else WEIGHTS / "digits_flow")

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()
