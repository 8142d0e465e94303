"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tasks.pipelines.family import Encoded, Family, Setting, first_half


class PixArt(Family):
    """A diffusion transformer that attends to T5's states.

    Prompts are lower-cased and stripped by the pipeline, but not cleaned (``clean_caption=False``: that needs two more
    packages), and the image has the size that was asked for (``use_resolution_binning=False``).

    Reference: Chen et al. 2023, "PixArt-alpha"; Chen et al. 2024, "PixArt-Sigma"; diffusers ``PixArtAlphaPipeline`` and
    ``PixArtSigmaPipeline``.
    """

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    text = ("text_encoder", "tokenizer")
    multiple = 2
    takes_tokens = True

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """T5's states, (1, max_tokens, D), and their mask, (1, max_tokens)."""
        tokens = {} if setting.max_tokens is None else {"max_sequence_length": setting.max_tokens}
        embeds, mask, _, _ = pipe.encode_prompt(text or "", False, device=device, clean_caption=False, **tokens)
        return {"embeds": embeds, "mask": mask}

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Encoded:
        """As :meth:`encode` gives them."""
        tokens = setting.max_tokens or 120
        return {"embeds": torch.zeros(1, tokens, config["caption_channels"]), "mask": torch.ones(1, tokens)}

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The transformer's mean."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(net, "use_additional_conditions", False) and net.config.sample_size == 128:
            resolution, ratio = [setting.height, setting.width], [setting.height / setting.width]
            sizes["resolution"] = torch.tensor(resolution, dtype=x.dtype, device=x.device).repeat(len(x), 1)
            sizes["aspect_ratio"] = torch.tensor(ratio, dtype=x.dtype, device=x.device).repeat(len(x), 1)
        output = net(
            x,
            encoder_hidden_states=cond["embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=n,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return first_half(output, x.shape[1])


FAMILY = PixArt()
