"""The tokens of a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tasks.registry import features
from tasks.tokens import refuse_other_samples, token_ids


@features.register("tokens")
@dataclass(frozen=True)
class Tokens:
    """The token numbers of a sample: strings as they are, 8x8 images as their 64 grey levels of 17.

    Continuous images are read at the nearest level, so models of pixels and of tokens can be judged alike.

    Reference: none needed.
    Cost: none.
    """

    needs_labels = False
    revision = "1"

    def check(self, shape: tuple[int, ...]) -> None:
        """Strings, or 8x8 grey images."""
        refuse_other_samples(tuple(shape))

    def dim(self, shape: tuple[int, ...]) -> int:
        """Number of tokens."""
        return math.prod(shape)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, L)."""
        return token_ids(samples)
