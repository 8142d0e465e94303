"""One trajectory per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.account import Account
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples


@strategies.register("single")
@dataclass(frozen=True)
class Single:
    """One trajectory per sample: the baseline that every other strategy equals with one particle.

    Args:
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: none needed.
    Cost: the solver's evaluations; no reward calls.
    """

    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    uses_reward = False
    branches = False
    intermediate = False
    semantics = "sample"
    columns = ()  # no further ones of the rows

    def account(self, evaluations: Sequence[int]) -> Account:
        """One trajectory."""
        return Account(sum(evaluations))

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples."""
        state = sampler.run(noise)
        spent = sampler.solver.spent(state) if hasattr(sampler.solver, "spent") else None
        return Samples(state.x, {} if spent is None else {"nfe": spent.int()})
