"""Peak signal-to-noise ratio against the clean digit."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.data import digits
from tasks.registry import rewards

PEAK = 2.0  # images lie in [-1, 1]
CEILING = 100.0  # an image that is equal to the last bit would be infinitely good


@rewards.register("psnr")
@dataclass(frozen=True)
class PSNR:
    """Peak signal-to-noise ratio in dB of a restored digit, against the clean one that its label names.

    ``10 log10(4 / mean (x - clean)^2)``, at most 100. Label i is image i of the digits, as in the model ``restore``.

    Reference: Huynh-Thu and Ghanbari 2008, "Scope of validity of PSNR in image/video quality assessment".
    Cost: negligible.
    """

    needs_labels = True
    cheap = True
    differentiable = True

    @property
    def revision(self) -> str:
        """Hash of the clean images."""
        return hashlib.sha256(digits.images().tobytes()).hexdigest()[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """8x8 grey images only."""
        if tuple(shape) != (1, 8, 8):
            raise ValueError(
                f"psnr compares with the 8x8 digits (1, 8, 8), but the model makes {tuple(shape)}. Use model=restore."
            )

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        if cond is None:
            raise ValueError("psnr needs labels: a label names the clean image. Set labels=cycle.")
        clean = torch.from_numpy(digits.images()).to(samples.device)
        if len(cond) and not 0 <= int(cond.min()) <= int(cond.max()) < len(clean):
            raise ValueError(
                f"psnr knows the labels 0 to {len(clean) - 1}, got {int(cond.min())} to {int(cond.max())}."
            )
        error = (samples.double() - clean[cond].double()).flatten(1).square().mean(dim=1)
        return (10 * math.log10(PEAK**2) - 10 * torch.log10(error)).clamp(max=CEILING)
