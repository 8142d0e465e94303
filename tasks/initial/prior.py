"""The process's own prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.registry import initials
from tasks.types import Noise


@initials.register("prior")
@dataclass(frozen=True)
class Prior:
    """Fresh noise at t=1: the ordinary beginning.

    Reference: Ho et al. 2020.
    """

    evaluations = 0

    def start(self, process: Any) -> float:
        """1."""
        return 1.0

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) draws of the prior."""
        return sampler.model.process.prior(sampler.model.shape, noise, sampler.times[0])
