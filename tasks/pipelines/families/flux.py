"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.pipelines.family import Encoded, Family, Setting, resolution_shift


class Flux(Family):
    """A transformer over packed 2x2 patches with CLIP's pooled text and T5's states; rectified flow.

    States are unpacked latents, (16, H/8, W/8), so that solvers, metrics and previews see pictures. A network with an
    embedded guidance scale (dev) is told 3.5 unless set.

    Reference: Black Forest Labs 2024, FLUX.1; diffusers ``FluxPipeline``.
    """

    pipelines = ("FluxPipeline",)
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    multiple = 2
    takes_tokens = True

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Dev does."""
        return bool(config.get("guidance_embeds"))

    def channels(self, config: Mapping[str, Any]) -> int:
        """A quarter of what the transformer takes: it sees four pixels as one."""
        return int(config["in_channels"]) // 4

    def default_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """1024 pixels a side, as the stock pipeline has it."""
        return (128, 128)

    def grid_options(self, scheduler: Mapping[str, Any], shape: tuple[int, ...], num_steps: int) -> dict[str, Any]:
        """Equal steps from 1 to 1/N, except of a class that lays its own with ``use_flow_sigmas``; shifted by size."""
        own = scheduler.get("use_flow_sigmas")
        sigmas = {} if own else {"sigmas": np.linspace(1.0, 1.0 / num_steps, num_steps).tolist()}
        return sigmas | resolution_shift(scheduler, shape)

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """T5's states, (1, max_tokens, D), and CLIP's pooled text, (1, P)."""
        tokens = {} if setting.max_tokens is None else {"max_sequence_length": setting.max_tokens}
        embeds, pooled, _ = pipe.encode_prompt(text or "", None, device=device, **tokens)
        return {"embeds": embeds, "pooled": pooled}

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Encoded:
        """As :meth:`encode` gives them."""
        return {
            "embeds": torch.zeros(1, setting.max_tokens or 512, config["joint_attention_dim"]),
            "pooled": torch.zeros(1, config["pooled_projection_dim"]),
        }

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The transformer's velocity, (B, C, H, W)."""
        count, _, height, width = x.shape
        guidance = None
        if net.config.guidance_embeds:
            scale = 3.5 if setting.embedded_guidance is None else setting.embedded_guidance
            guidance = torch.full((count,), scale, dtype=torch.float32, device=x.device)
        output = net(
            hidden_states=pack(x),
            timestep=n.to(x.dtype) / 1000,
            guidance=guidance,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["embeds"],
            txt_ids=torch.zeros(cond["embeds"].shape[1], 3, dtype=x.dtype, device=x.device),
            img_ids=positions(height // 2, width // 2, x),
            return_dict=False,
        )[0]
        return unpack(output, height, width)

    def unscale(self, config: Any, x0: Tensor) -> Tensor:
        """Scaled and shifted."""
        return x0 / config.scaling_factor + config.shift_factor


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W / 4, 4 C): every 2x2 patch becomes one token."""
    count, channels, height, width = x.shape
    patches = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    count, _, channels = tokens.shape
    patches = tokens.reshape(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, channels // 4, height, width)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """(0, row, column) of every token, (height width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(like.device, like.dtype)


FAMILY = Flux()
