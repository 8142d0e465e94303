"""One trajectory per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples


@strategies.register("single")
@dataclass(frozen=True)
class Single:
    """One trajectory per sample: the baseline that every other strategy equals with one particle.

    Reference: none needed.
    Cost: the solver's evaluations; no reward calls.
    """

    particles = 1
    uses_reward = False
    branches = False

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples."""
        return Samples(sampler.run(noise).x)
