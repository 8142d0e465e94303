"""CLIP's picture embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks import clip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.registry import features

SOURCE = Source(
    "features clip",
    "clip-vit-large-patch14-336",
    "openai/clip-vit-large-patch14-336 from the Hugging Face hub (config.json, model.safetensors and the tokenizer)",
    "clip",
)


@features.register("clip")
@dataclass(frozen=True)
class CLIP:
    """The projected picture embedding of a CLIP model, not normalised; ViT-L/14 at 336 pixels is CMMD's.

    Pictures are rounded to 8 bits and resized bicubically to the square that the model reads; CMMD's published values
    use no antialiasing.

    Args:
        path: folder with a CLIP model in transformers' format, or a hub id; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        antialias: whether the filter grows where a picture shrinks.

    Reference: Radford et al. 2021; Jayasumana et al. 2024 (CMMD).
    Cost: one picture through the vision tower.
    """

    path: str = ""
    pinned: str = ""
    antialias: bool = False

    needs_labels = False

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return SOURCE.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, and the weights at hand."""
        check_picture(shape, "features clip")
        SOURCE.find(self.path, self.pinned)

    def dim(self, shape: tuple[int, ...]) -> int:
        """Length of the embedding."""
        from transformers import CLIPConfig

        return int(CLIPConfig.from_pretrained(SOURCE.find(self.path, self.pinned)).projection_dim or 0)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, D)."""
        place = SOURCE.find(self.path, self.pinned)
        tower = clip_tower.load(str(place), self.revision, str(samples.device))
        prepare = Preparation(tower.size, fit="squash", antialias=self.antialias, levels=True)
        with torch.no_grad():
            return tower.pictures(prepare(samples))
