"""The decoder of a saved pipeline, alone: latents become images without the network or the encoders in memory."""

from __future__ import annotations

import json
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tasks import registry
from tasks.pipelines.memory import Portions
from tasks.pipelines.whole import check_whole, first_line
from tasks.recipe import canonical


class PipelineDecoder:
    """Images of clean latents.

    Args:
        spec: the plug-in (``tasks/models/diffusers.py``), of a family with a decoder.
        device: where it runs.

    Raises:
        ValueError: weights that are damaged.
    """

    def __init__(self, spec: Any, device: str) -> None:
        import diffusers

        check_whole(spec.folder)
        root, name = spec.folder.root, spec.folder.index["vae"][1]
        options = {"variant": spec.variant} if spec.variant else {}
        try:
            vae = getattr(diffusers, name).from_pretrained(
                str(root), subfolder="vae", dtype=getattr(torch, spec.dtype), use_safetensors=True,
                local_files_only=True, **options,
            )  # fmt: skip
        except Exception as error:  # as of a whole pipeline, many kinds
            raise ValueError(f"{root}/vae cannot be loaded: {first_line(error)}. Save or download it again.") from None
        vae.eval().requires_grad_(False)
        if spec.decode == "sliced":
            vae.enable_slicing()
        elif spec.decode == "tiled":
            vae.enable_tiling()
        self._parts, self._family, self._device = SimpleNamespace(vae=vae), spec.folder.family, device
        self._stays = spec.offload == "none"
        if self._stays:
            vae.to(device)
        self._calls = Portions("the decoder", spec.halvings, spec.decode_rows)

    def __call__(self, x0: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 3, H, W), of clean latents, at most ``decode_rows`` at once."""
        self._parts.vae.to(self._device)
        images = self._calls(lambda rows: self._family.decode(self._parts, x0[rows]), len(x0))
        if not self._stays:
            self._parts.vae.to("cpu")
        return images.to(x0.dtype).clamp(-1, 1)


def decoder(spec: Any, device: str) -> PipelineDecoder:
    """The decoder of a plug-in, the same one for all that ask in this process."""
    return _decoder(canonical(registry.models.describe(spec)), device)


@lru_cache(maxsize=4)
def _decoder(spec: str, device: str) -> PipelineDecoder:
    return PipelineDecoder(registry.models.build(json.loads(spec)), device)
