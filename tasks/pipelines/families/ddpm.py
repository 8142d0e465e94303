"""Unconditional and class-conditional UNets on pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.checkpoint import check_embedding
from tasks.pipelines.family import Family, Setting, first_half


class DDPM(Family):
    """A UNet2DModel on pixels. With class embeddings, the last one means "no label".

    Reference: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; diffusers ``DDPMPipeline``, ``DDIMPipeline``.
    """

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    network = "unet"
    vae = False

    def classes(self, config: Mapping[str, Any]) -> int:
        """Embeddings less the one for no label; 0 where there are none."""
        return max((config.get("num_class_embeds") or 0) - 1, 0)

    def check_network(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """Labels are embedded by a table or not at all."""
        check_embedding(config)

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Tensor | None:
        """A label where there are any, (1,)."""
        return torch.zeros(1, dtype=torch.int64) if self.classes(config) else None

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The UNet's answer, without a learned variance."""
        return first_half(net(x, n, cond, return_dict=False)[0], x.shape[1])


FAMILY = DDPM()
