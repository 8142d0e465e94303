"""Best of N independent trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.account import Account
from tasks.lookahead import rows_of
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
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Stiennon et al. 2020, "Learning to summarize from human feedback"; Nakano et al. 2021 (best of n).
    Cost: N times the solver's evaluations and N reward calls (none for N = 1).
    Identities: with n=1 this is ``single``, draw for draw; candidate k is the same sample for every N > k.
    """

    n: int = 4
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    intermediate = False
    semantics = "best"
    columns = ("candidate_rewards", "slot")

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

    def account(self, evaluations: Sequence[int]) -> Account:
        """N trajectories, and a reward call for each unless there is only one."""
        calls = self.n if self.n > 1 else 0
        return Account(self.n * sum(evaluations), calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with columns ``candidate_rewards`` (B, N) and ``slot`` (B,)."""
        if self.n == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide = sampler.repeat(self.n)
        x0 = wide.run(noise.repeat(self.n)).x  # (B N, *shape)
        rewards = reward(sampler.model.decode(x0, wide.cond), wide.cond).view(-1, self.n)
        slot = rewards.argmax(dim=1)
        return Samples(reindex(x0, rows_of(slot[:, None], self.n)), {"candidate_rewards": rewards, "slot": slot})
