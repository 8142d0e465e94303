"""The sample itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tasks.registry import features


@features.register("identity")
@dataclass(frozen=True)
class Identity:
    """The sample, flattened: the right features where the space itself is meaningful, as for a Gaussian mixture.

    Reference: none needed.
    Cost: none.
    """

    needs_labels = False
    revision = "1"

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape."""

    def dim(self, shape: tuple[int, ...]) -> int:
        """Number of elements."""
        return math.prod(shape)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, D)."""
        return samples.flatten(1)
