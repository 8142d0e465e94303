"""DINOv2's picture embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.pictures import IMAGENET_MEAN, IMAGENET_STD, Preparation, check_picture
from tasks.pretrained import Source, from_folder
from tasks.registry import features

SOURCE = Source(
    "features dinov2",
    "dinov2-large",
    "facebook/dinov2-large from the Hugging Face hub (config.json, model.safetensors)",
    "dinov2",
)


@features.register("dinov2")
@dataclass(frozen=True)
class DINOv2:
    """The class token of a DINOv2 model after its last norm: closer to what people see than Inception's features.

    Pictures are rounded to 8 bits and resized bicubically to a square.

    Args:
        path: folder with a DINOv2 model in transformers' format, or a hub id; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        size: side of the square in pixels.

    Reference: Oquab et al. 2023, "DINOv2"; Stein et al. 2023, "Exposing flaws of generative model evaluation metrics",
        with ViT-L/14 at 224 pixels.
    Cost: one picture through the network.
    """

    path: str = ""
    pinned: str = ""
    size: int = 224

    needs_labels = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"features.size must be at least 1 pixel, got {self.size}.")

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return SOURCE.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, the weights at hand, and a size of whole patches."""
        check_picture(shape, "features dinov2")
        patch = self._config.patch_size
        if self.size % patch:
            raise ValueError(
                f"features.size must be a multiple of the model's patch of {patch} pixels, got {self.size}."
            )

    @property
    def _config(self) -> Any:
        from transformers import Dinov2Config

        return Dinov2Config.from_pretrained(SOURCE.find(self.path, self.pinned))

    def dim(self, shape: tuple[int, ...]) -> int:
        """Width of the network."""
        return self._config.hidden_size

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, D)."""
        network = _load(str(SOURCE.find(self.path, self.pinned)), self.revision, str(samples.device))
        prepare = Preparation(self.size, IMAGENET_MEAN, IMAGENET_STD, fit="squash", levels=True)
        with torch.no_grad():
            return network(pixel_values=prepare(samples)).pooler_output


@lru_cache(maxsize=2)
def _load(place: str, revision: str, device: str) -> Any:
    from transformers import Dinov2Model

    return from_folder(Dinov2Model, Path(place), device)
