"""A saved pipeline as a denoiser: its network inside our sampling loop, its encoders in front of it."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.layer_skip import skipping
from tasks.pipelines.decoder import decoder
from tasks.pipelines.family import Encoded
from tasks.pipelines.loading import load, prepare
from tasks.pipelines.memory import Portions
from tasks.pipelines.texts import Kept, Texts
from tasks.processes import Time, expand, to_x0

ASSEMBLED = 4  # batches of conditions that are held: those of a block, with and without prompt


class PipelineDenoiser:
    """The posterior mean (or, of a distilled network, the end of its flow) from a diffusers pipeline.

    Args:
        spec: the plug-in (``tasks/models/diffusers.py``).
        device: where it runs.

    Attributes:
        texts: encoded prompts; None where conditions are labels.
    """

    def __init__(self, spec: Any, device: str) -> None:
        folder = spec.folder
        self.process, self.prediction = folder.process, folder.prediction
        self.shape, self.num_classes = spec.shape, spec.num_classes
        self._family, self._setting = folder.family, spec.setting
        self._dtype, self._device, self._spec = getattr(torch, spec.dtype), device, spec
        self.pipe = load(spec, without=("vae",) if spec.lora else ("vae", *self._family.text))
        self._encoders = self.pipe if spec.lora else None  # an adapter may change the encoders too
        self.network = prepare(self.pipe, spec, device)
        self.texts = Texts(self._encode, spec.text_identity(device)) if self._family.text else None
        self._assembled: OrderedDict[tuple[int, ...], Encoded] = OrderedDict()
        self._calls = Portions("the network", spec.halvings)

    @property
    def skeleton(self) -> torch.nn.Module:
        """The network without weights, on the meta device: where work is counted."""
        return self._spec.skeleton

    def skipping(self, mask: int) -> AbstractContextManager[float]:
        """Within, the network runs without the blocks of a mask; gives the share of multiply-adds that is left."""
        return skipping(self.network, self._spec.blocks, mask)

    def remember(self, kept: Kept) -> None:
        """Keep encoded prompts there, and look for them there."""
        if self.texts is not None:
            self.texts.kept = kept

    def _encode(self, text: str | None) -> Encoded:
        """One text through the pipeline's encoders, which are loaded when the first text needs them."""
        if self._encoders is None:
            self._encoders = load(self._spec, without=("vae",), given={self._family.network: self.network})
        self._move_encoders(self._device)
        with torch.no_grad():
            return self._family.encode(self._encoders, text, self._setting, self._device)

    def _move_encoders(self, device: str) -> None:
        """Bring the encoders to a device; those of the pipeline itself are where its options want them."""
        if self._encoders is None or self._encoders is self.pipe:
            return
        for name in self._family.text:
            if isinstance(encoder := getattr(self._encoders, name), torch.nn.Module):
                encoder.to(device)

    def _conditions(self, cond: Tensor | None, rows: int) -> Any:
        """Labels as they are; ids of prompts as encoded texts, held while the rows' prompts stay."""
        if self.texts is None:
            if not self.num_classes:
                return None
            return torch.full((rows,), self.num_classes, device=self._device) if cond is None else cond
        ids = (self.num_classes,) * rows if cond is None else tuple(cond.tolist())
        if ids not in self._assembled:
            self._assembled[ids] = self.texts.batch(tuple(map(self._spec.text, ids)), self._device, self._dtype)
            if self._spec.offload != "none":
                self._move_encoders("cpu")
            while len(self._assembled) > ASSEMBLED:
                self._assembled.popitem(last=False)
        return self._assembled[ids]

    def _attention(self) -> AbstractContextManager[Any]:
        if self._spec.attention is None:
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self._spec.attention.upper()))

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x], (B, C, H, W). ``cond`` holds labels or prompt ids; ``num_classes`` or None means none."""
        n = torch.zeros(len(x), dtype=torch.float32, device=x.device) + self.process.model_time(t)
        n, given = n.float(), x.to(self._dtype)
        if self._spec.channels_last:
            given = given.contiguous(memory_format=torch.channels_last)

        def answer(rows: slice) -> Tensor:
            here = self._conditions(None if cond is None else cond[rows], len(given[rows]))
            return self._family.predict(self.pipe, self.network, given[rows], n[rows], here, self._setting)

        with self._attention():
            output = self._calls(answer, len(x)).to(x.dtype)
        return to_x0(self.prediction, x, output, expand(self.process.alpha(t), x), expand(self.process.sigma(t), x))

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images in [-1, 1], (B, 3, H, W), of clean states; the decoder is loaded when it is first needed."""
        return decoder(self._spec, self._device)(x0) if self._family.vae else x0.clamp(-1, 1)

    def columns(self, labels: np.ndarray) -> dict[str, np.ndarray]:
        """What rows say beside their samples: the prompt, its id and group, and how many rows shared a call.

        Args:
            labels: the rows' prompt ids, (B,) int64; -1 for none.
        """
        found: dict[str, np.ndarray] = {"rows_per_call": np.full(len(labels), self._calls.size, dtype=np.int32)}
        if self.texts is None:
            return found
        table, empty = self._spec.prompt_table, self._spec.negative_prompt or ""
        for name, values, absent in (
            ("prompt", table.texts, empty), ("prompt_id", table.ids, ""), ("group", table.groups, "")
        ):  # fmt: skip
            found[name] = np.array([values[i] if 0 <= i < len(values) else absent for i in labels], dtype=object)
        return found
