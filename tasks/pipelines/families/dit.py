"""DiT: class-conditional diffusion transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.pipelines.family import Family, Setting, first_half


class DiT(Family):
    """A transformer on latents that is told a label; the label after the last means none.

    Reference: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"; diffusers ``DiTPipeline``.
    """

    pipelines = ("DiTPipeline",)

    def classes(self, config: Mapping[str, Any]) -> int:
        """1000 for ImageNet."""
        return int(config["num_embeds_ada_norm"])

    def check_network(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """Positions are those of one size."""
        side = config["sample_size"]
        if (height, width) != (side, side):
            raise ValueError(
                f"model.height and width give latents of {height} x {width}, but this transformer was made for "
                f"{side} x {side}. Leave them out."
            )

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Tensor:
        """A label, (1,)."""
        return torch.zeros(1, dtype=torch.int64)

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The transformer's mean; its variance is not used, as with a stock DDIM scheduler."""
        output = net(x, timestep=n, class_labels=cond, return_dict=False)[0]
        return first_half(output, x.shape[1])


FAMILY = DiT()
