"""Randomness keyed by (seed, sample index, slot, step, purpose): every row owns its streams.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based
generator: a number is a pure function of its key and counter, so it does not matter in which batch, on which worker or
in what order rows are made. It is vectorised over rows with integer arithmetic, which is exact on every device; the
library generators cannot be keyed per row without a Python loop over the batch.

Key: 64 bits of SHA-256(seed, purpose). Counter: (block, sample index, step, slot), 32 bits each.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
MAX_INDEX = 2**32


@lru_cache(maxsize=4096)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32x32-bit product wraps in int64, but its 64 bits are right; masking after the shift gives the high word.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class RowNoise:
    """The streams of a batch of rows.

    Two draws of the same purpose at the same step are the same numbers: a solver that needs two gives them two names.

    Attributes:
        seed: the study's seed.
        indices: sample index of each row, (B,) int64 below 2^32.
        slots: particle slot of each row, (B,) int64 or one int for all.
        step: step index; ``at`` makes the next one.
        dtype: dtype of normal draws.
    """

    seed: int
    indices: Tensor
    slots: Tensor | int = 0
    step: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.indices)

    @property
    def device(self) -> torch.device:
        """Where the draws lie."""
        return self.indices.device

    def at(self, step: int) -> RowNoise:
        """The same rows at another step (0-based; the prior is drawn at step -1)."""
        return replace(self, step=step)

    def slot(self, slot: int | Tensor) -> RowNoise:
        """The same rows in another particle slot, or each in its own, (B,) int64."""
        return replace(self, slots=slot)

    def repeat(self, particles: int) -> RowNoise:
        """B rows of K slots each, rows outermost: (B K,)."""
        slots = torch.arange(particles, device=self.device).repeat(self.num_rows)
        return replace(self, indices=self.indices.repeat_interleave(particles), slots=slots)

    def shifted(self, slots: int) -> RowNoise:
        """The same rows, so many slots further: streams that nothing else at these slots has."""
        return replace(self, slots=self.slots + slots)

    def _words(self, count: int, purpose: str) -> Tensor:
        """``count`` blocks of four 32-bit words per row, (B, count, 4) int64."""
        block = torch.arange(count, device=self.device)[None, :]
        slots = self.slots if isinstance(self.slots, Tensor) else torch.full_like(self.indices, self.slots)
        step = torch.full_like(self.indices, (self.step + 1) & _MASK)
        words = philox((block, self.indices[:, None], step[:, None], slots[:, None]), _key(self.seed, purpose))
        return torch.stack(torch.broadcast_tensors(*words), dim=-1)

    def normal(self, shape: tuple[int, ...], purpose: str) -> Tensor:
        """Standard normal draws, (B, *shape), by Box-Muller in float64."""
        size = math.prod(shape)
        words = self._words((size + 3) // 4, purpose).double()
        radius = torch.sqrt(-2.0 * torch.log((words[..., 0::2] + 0.5) * 2.0**-32))
        angle = (words[..., 1::2] + 0.5) * (2.0 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        return pairs.flatten(1)[:, :size].reshape(self.num_rows, *shape).to(self.dtype)

    def uniform(self, shape: tuple[int, ...], purpose: str) -> Tensor:
        """Uniform draws in (0, 1) with 52 bits, (B, *shape) float64: a float32 uniform truncates Gumbel and tails.

        A 53rd bit and the half that keeps 0 out do not fit a float64 together: the largest draw would round to 1.
        """
        size = math.prod(shape)
        words = self._words((size + 1) // 2, purpose)
        high, low = words[..., 0::2] >> 5, words[..., 1::2] >> 6
        values = ((((high << 26) + low) >> 1).double() + 0.5) * 2.0**-52
        return values.flatten(1)[:, :size].reshape(self.num_rows, *shape)

    def integers(self, purpose: str) -> list[int]:
        """One 63-bit integer per row, to seed a library generator."""
        words = self._words(1, purpose)[:, 0, :2]
        return ((words[:, 0] << 31) ^ words[:, 1]).tolist()
