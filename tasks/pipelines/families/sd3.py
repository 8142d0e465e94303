"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.pipelines.family import Encoded, Family, Setting, resolution_shift


class StableDiffusion3(Family):
    """A multimodal transformer with two CLIP encoders and, where it was saved, T5; rectified flow.

    Reference: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; diffusers
    ``StableDiffusion3Pipeline``.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    text = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    optional = ("text_encoder_3", "tokenizer_3")
    multiple = 2
    takes_tokens = True

    def check_network(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """Positions are known up to a size."""
        most, patch = config["pos_embed_max_size"], config["patch_size"]
        if max(height, width) // patch > most:
            raise ValueError(
                f"model.height and width give latents of {height} x {width}, but the transformer knows positions for "
                f"at most {most * patch} a side."
            )

    def grid_options(self, scheduler: Mapping[str, Any], shape: tuple[int, ...], num_steps: int) -> dict[str, Any]:
        """Shifted by the image's size where the scheduler does that."""
        return dict(resolution_shift(scheduler, shape))

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """All encoders' states in a row, (1, 77 + max_tokens, D), and the pooled text, (1, P)."""
        tokens = {} if setting.max_tokens is None else {"max_sequence_length": setting.max_tokens}
        embeds, _, pooled, _ = pipe.encode_prompt(
            text or "", None, None, device=device, do_classifier_free_guidance=False, **tokens
        )
        return {"embeds": embeds, "pooled": pooled}

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Encoded:
        """As :meth:`encode` gives them."""
        tokens = 77 + (setting.max_tokens or 256)
        return {
            "embeds": torch.zeros(1, tokens, config["joint_attention_dim"]),
            "pooled": torch.zeros(1, config["pooled_projection_dim"]),
        }

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The transformer's velocity."""
        return net(
            hidden_states=x,
            timestep=n,
            encoder_hidden_states=cond["embeds"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]

    def unscale(self, config: Any, x0: Tensor) -> Tensor:
        """Scaled and shifted."""
        return x0 / config.scaling_factor + config.shift_factor


FAMILY = StableDiffusion3()
