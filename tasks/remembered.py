"""Scores remembered by content: a batch that was scored before costs nothing."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor


class Remembered:
    """A scorer whose values are kept by sample, label and row; the identity of the scorer is its instance's.

    A batch is asked again whole unless every row of it is known, because a network's last bits may depend on how many
    rows it is given; so values are those of the scorer alone, bit for bit.

    Args:
        scorer: what is asked, (samples, cond) -> (B,).
        size: most values that are kept; the oldest go first.

    Attributes:
        scored: rows that the scorer was asked about.
        reused: rows that were known.
        seconds: that the scorer took.
    """

    def __init__(self, scorer: Any, size: int = 1_000_000) -> None:
        self._scorer, self._size = scorer, size
        self._values: OrderedDict[bytes, Tensor] = OrderedDict()
        self.scored, self.reused, self.seconds = 0, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_scorer"], name)

    def __call__(self, samples: Tensor, cond: Tensor | None, indices: Tensor | None = None) -> Tensor:
        """(B,), of the scorer's dtype; samples whose gradient is wanted are always scored.

        ``indices`` are the rows', (B,) int64, for a scorer that depends on them.
        """
        if samples.requires_grad and torch.is_grad_enabled():
            return self.always(samples, cond, indices)
        keys = _keys(samples, cond, indices)
        known = [self._values.get(key) for key in keys]
        if keys and all(value is not None for value in known):
            self.reused += len(keys)
            return torch.stack(known).to(samples.device)  # type: ignore[arg-type]
        values = self.always(samples, cond, indices)
        kept = values.detach().cpu()
        self._values |= dict(zip(keys, kept.clone(), strict=True))
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return values

    def always(self, samples: Tensor, cond: Tensor | None, indices: Tensor | None = None) -> Tensor:
        """The scorer's answer, timed and counted, without the memory."""
        began = time.perf_counter()
        values = (self._scorer if indices is None else self._scorer.at(indices))(samples, cond)
        if values.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        self.scored += len(samples)
        return values


def _keys(samples: Tensor, cond: Tensor | None, indices: Tensor | None) -> list[bytes]:
    """A digest of every row: its shape, type, bytes, label and index, and how many rows are scored with it."""
    rows = samples.detach().cpu().contiguous()
    none = [None] * len(rows)
    labels, places = (none if given is None else given.tolist() for given in (cond, indices))
    head = f"{tuple(rows.shape)}/{rows.dtype}"
    return [
        hashlib.sha256(f"{head}/{label}/{place}/".encode() + row.numpy().tobytes()).digest()
        for row, label, place in zip(rows, labels, places, strict=True)
    ]
