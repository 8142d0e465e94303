"""Encoded prompts: every distinct text goes through the encoders once, alone, and is kept."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tasks.pipelines.family import Encoded


class Kept(Protocol):
    """Where encoded prompts are kept between processes; any of them may be missing at any time."""

    def load(self, key: str) -> Mapping[str, np.ndarray] | None: ...
    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None: ...


class Texts:
    """The encoders behind a cache in this process, and behind one that outlives it.

    A text is encoded alone, so that what comes out does not depend on the texts beside it.

    Args:
        encode: one text, or None for the empty condition, to tensors (1, ...).
        identity: what else determines the answer: encoders, their type, their options.
        max_bytes: bound of the cache in this process; the texts unused for longest go first.

    Attributes:
        kept: the cache that outlives the process, if any.
        encoded: texts that went through the encoders.
    """

    def __init__(self, encode: Callable[[str | None], Encoded], identity: Any, max_bytes: int = 2**31) -> None:
        self._encode, self._identity, self._max = encode, identity, max_bytes
        self._held: OrderedDict[str | None, Encoded] = OrderedDict()
        self._bytes = 0
        self.kept: Kept | None = None
        self.encoded = 0

    def key(self, text: str | None) -> str:
        """32 hexadecimal digits: what is encoded, and by what."""
        data = json.dumps([self._identity, text], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(data.encode()).hexdigest()[:32]

    def __call__(self, text: str | None) -> Encoded:
        """The tensors of one text, (1, ...) each, on the CPU."""
        if text in self._held:
            self._held.move_to_end(text)
            return self._held[text]
        found = self._load(text)
        if found is None:
            found = {name: value.detach().cpu() for name, value in self._encode(text).items()}
            self.encoded += 1
            if self.kept is not None:
                self.kept.save(self.key(text), {name: _to_numpy(value) for name, value in found.items()})
        self._held[text] = found
        self._bytes += _size(found)
        while self._bytes > self._max and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return found

    def _load(self, text: str | None) -> Encoded | None:
        arrays = None if self.kept is None else self.kept.load(self.key(text))
        return None if arrays is None else {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}

    def batch(self, texts: tuple[str | None, ...], device: Any, dtype: torch.dtype) -> Encoded:
        """The tensors of many rows, (B, ...) each; floating ones in the network's type."""
        distinct = list(dict.fromkeys(texts))
        found = [self(text) for text in distinct]
        rows = torch.tensor([distinct.index(text) for text in texts], device=device)
        stacked = {name: torch.cat([each[name] for each in found]).to(device) for name in found[0]}
        return {n: (v.to(dtype) if v.is_floating_point() else v).index_select(0, rows) for n, v in stacked.items()}


def _to_numpy(value: Tensor) -> np.ndarray:
    """numpy has no bfloat16; float32 holds it exactly."""
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _size(found: Encoded) -> int:
    return sum(value.nbytes for value in found.values())
