"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.pipelines.family import Encoded, Family, Setting, guidance_embedding


class StableDiffusionXL(Family):
    """A UNet that attends to two CLIP encoders and is told a pooled text and sizes.

    The original size and the target size are the image's, the crop begins at (0, 0), as the stock pipeline has it. The
    decoder of a half-precision pipeline that overflows (``force_upcast``) works in float32.

    Reference: Podell et al. 2023, "SDXL"; diffusers ``StableDiffusionXLPipeline``.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    network = "unet"
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional = ("text_encoder", "tokenizer")

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Latent consistency models do."""
        return config.get("time_cond_proj_dim") is not None

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """Both encoders' states, (1, 77, D), and the pooled text, (1, P)."""
        found = pipe.encode_prompt(text or "", device=device, do_classifier_free_guidance=text is None)
        embeds, pooled = (found[1], found[3]) if text is None else (found[0], found[2])
        return {"embeds": embeds, "pooled": pooled}

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Encoded:
        """As :meth:`encode` gives them; the pooled text fills what the six sizes leave of the embedding's input."""
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        return {"embeds": torch.zeros(1, 77, config["cross_attention_dim"]), "pooled": torch.zeros(1, pooled)}

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The UNet's answer."""
        sizes = (setting.height, setting.width, 0, 0, setting.height, setting.width)
        ids = torch.tensor([sizes], dtype=x.dtype, device=x.device).repeat(len(x), 1)
        scale = 5.0 if setting.embedded_guidance is None else setting.embedded_guidance
        return net(
            x,
            n,
            encoder_hidden_states=cond["embeds"],
            timestep_cond=guidance_embedding(pipe, net, scale, x),
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": ids},
            return_dict=False,
        )[0]

    def unscale(self, config: Any, x0: Tensor) -> Tensor:
        """With the decoder's own mean and spread where it has them."""
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return x0 / config.scaling_factor
        shape = (1, -1, 1, 1)
        mean, std = (torch.tensor(v, dtype=x0.dtype, device=x0.device).view(shape) for v in (mean, std))
        return x0 * std / config.scaling_factor + mean

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        """Images; in float32 where half precision overflows."""
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.to(dtype=torch.float32)
        return super().decode(pipe, x0)


FAMILY = StableDiffusionXL()
