"""Best of N independent trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, reindex


@strategies.register("best_of_n")
@dataclass(frozen=True)
class BestOfN:
    """Draw N independent samples and keep the one with the largest reward.

    An optimiser, not a sampler of a tilted law: its distribution is at most log N - (N - 1) / N nats away from the
    model's. All N rewards are kept in the column ``candidate_rewards``, so that one run tells the whole curve k <= N.

    Args:
        n: number of candidates N.

    Reference: Stiennon et al. 2020, "Learning to summarize from human feedback"; Nakano et al. 2021 (best of n).
    Cost: N times the solver's evaluations and N reward calls (none for N = 1).
    Identities: with n=1 this is ``single``, draw for draw; candidate k is the same sample for every N > k.
    """

    n: int = 4

    branches = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"strategy.n must be at least 1, got {self.n}.")

    @property
    def particles(self) -> int:
        """N."""
        return self.n

    @property
    def uses_reward(self) -> bool:
        """A single candidate needs no choice."""
        return self.n > 1

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with columns ``candidate_rewards`` (B, N) and ``slot`` (B,)."""
        if self.n == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide = sampler.repeat(self.n)
        x0 = wide.run(noise.repeat(self.n)).x  # type: ignore[attr-defined]  # (B N, *shape)
        rewards = reward(sampler.model.decode(x0, wide.cond), wide.cond).view(-1, self.n)
        slot = rewards.argmax(dim=1)
        rows = torch.arange(len(slot), device=slot.device) * self.n + slot
        return Samples(reindex(x0, rows), {"candidate_rewards": rewards, "slot": slot})
