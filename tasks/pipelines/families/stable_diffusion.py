"""Stable Diffusion 1.x and 2.x, and latent consistency models distilled from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.pipelines.family import Encoded, Family, Setting, guidance_embedding


class StableDiffusion(Family):
    """A UNet that attends to CLIP's tokens; eps or v prediction, by the scheduler's configuration.

    A network with an embedded guidance scale (latent consistency models) is told 8.5 unless set.

    Reference: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; diffusers
    ``StableDiffusionPipeline`` and ``LatentConsistencyModelPipeline``.
    """

    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network = "unet"
    text = ("text_encoder", "tokenizer")

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Latent consistency models do."""
        return config.get("time_cond_proj_dim") is not None

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """CLIP's last hidden states, (1, 77, D)."""
        embeds, _ = pipe.encode_prompt(text or "", device, 1, False)
        return {"embeds": embeds}

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Encoded:
        """As :meth:`encode` gives them."""
        return {"embeds": torch.zeros(1, 77, config["cross_attention_dim"])}

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The UNet's answer."""
        scale = 8.5 if setting.embedded_guidance is None else setting.embedded_guidance
        return net(
            x,
            n,
            encoder_hidden_states=cond["embeds"],
            timestep_cond=guidance_embedding(pipe, net, scale, x),
            return_dict=False,
        )[0]


FAMILY = StableDiffusion()
