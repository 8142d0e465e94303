"""From samples in [-1, 1] to what a pretrained network reads: colour, size and scale, as declared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preparation:
    """How pictures become a network's input; every field changes what is measured.

    Attributes:
        size: side of the square that the network reads, in pixels.
        mean, std: of every colour, subtracted and divided by.
        fit: crop (shorter side to size, middle kept), pad (longer side to size, black around), squash (both sides).
        antialias: whether the bicubic filter grows where a picture shrinks, as Pillow's does.
        levels: whether pictures are rounded to 8 bits first, as in a file; then no gradient passes.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: str = "crop"
    antialias: bool = True
    levels: bool = False

    def __call__(self, samples: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] -> (B, 3, size, size) float32.

        Bicubic with a = -1/2 where it is antialiased: Pillow's filter, up to Pillow's rounding to 8 bits.
        """
        x = unit(samples, self.levels)
        height, width = x.shape[-2:]
        edge = {"crop": min, "pad": max}.get(self.fit)
        sides = [round(side * self.size / edge(height, width)) if edge else self.size for side in (height, width)]
        if sides != [height, width]:
            x = interpolate(x, sides, mode="bicubic", align_corners=False, antialias=self.antialias).clamp(0, 1)
        if self.fit == "crop":
            top, left = ((side - self.size) // 2 for side in sides)
            x = x[..., top : top + self.size, left : left + self.size]
        elif self.fit == "pad":
            top, left = ((self.size - side) // 2 for side in sides)
            x = pad(x, (left, self.size - sides[1] - left, top, self.size - sides[0] - top))
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def unit(samples: Tensor, levels: bool) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1]; grey becomes three equal colours."""
    x = (samples.float().clamp(-1, 1) + 1) / 2
    if levels:
        x = (x * 255).round() / 255
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def check_picture(shape: tuple[int, ...], plugin: str) -> None:
    """Refuse what is no grey or colour picture."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{plugin} reads pictures (1, H, W) or (3, H, W), but the model makes {tuple(shape)}.")
