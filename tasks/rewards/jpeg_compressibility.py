"""How small an image is as a JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import rewards


@rewards.register("jpeg_compressibility")
@dataclass(frozen=True)
class JPEGCompressibility:
    """Minus the kilobytes of an image as a JPEG, so that larger is more compressible.

    The image is taken to 8 bits from [-1, 1]. The encoder is Pillow's (libjpeg-turbo), whose version is part of
    ``revision``.

    Args:
        quality: JPEG quality, 1 to 95.

    Reference: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", section 5.1.
    Cost: one JPEG encoding on the CPU.
    """

    quality: int = 95

    needs_labels = False
    differentiable = False

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"reward.quality must be between 1 and 95, got {self.quality}.")

    @property
    def revision(self) -> str:
        """The encoder: another one may give other sizes."""
        from PIL import features

        return f"1/{features.version('libjpeg_turbo') or features.version('jpg')}"

    def check(self, shape: tuple[int, ...]) -> None:
        """Grey or colour images."""
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"jpeg_compressibility needs images (1, H, W) or (3, H, W), but the model makes {tuple(shape)}."
            )

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        from PIL import Image

        levels = ((samples.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        sizes = []
        for image in levels:
            buffer = io.BytesIO()
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(buffer, format="JPEG", quality=self.quality)
            sizes.append(buffer.tell() / 1000)
        return -torch.tensor(sizes, dtype=torch.float64, device=samples.device)
