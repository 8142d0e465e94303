"""Best of N with unpromising candidates stopped on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.account import Account
from tasks.lookahead import judge, refuse_travel, rows_of
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, reindex


@strategies.register("pruned_best_of_n")
@dataclass(frozen=True)
class PrunedBestOfN:
    """Best of N by successive halving: at some steps only the candidates with the best predictions go on.

    After the fraction c of the steps, for every c in ``checks``, the reward judges each candidate's clean prediction
    (the one that the last step made anyway) and the best 1/factor of them stay, rounded up. A verifier of steps in the
    sense of process rewards.

    Args:
        n: number of candidates N at the start.
        factor: how many times fewer candidates stay at a check.
        checks: fractions of the steps after which candidates are compared, increasing, in (0, 1).
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Karnin et al. 2013, "Almost optimal exploration in multi-armed bandits" (sequential halving); Manvi et
    al. 2024, "Adaptive Inference-Time Compute" (stopping samples in mid-generation).
    Cost: each step for the candidates that are still there; a reward call for each candidate at each check and at the
    end.
    Identities: without checks this is ``best_of_n``; the candidates are its candidates; with n=1 it is ``single``.
    """

    n: int = 8
    factor: float = 2.0
    checks: tuple[float, ...] = (0.3, 0.6)
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.n < 1 or self.factor < 1:
            raise ValueError(f"pruned_best_of_n needs n >= 1 and factor >= 1, got {self.n} and {self.factor}.")
        if not all(0 < a < b < 1 for a, b in zip((1e-9, *self.checks), (*self.checks, 1 - 1e-9), strict=True)):
            raise ValueError(f"strategy.checks must increase within (0, 1), got {list(self.checks)}.")

    @property
    def particles(self) -> int:
        """N, at the start."""
        return self.n

    @property
    def uses_reward(self) -> bool:
        """A single candidate needs no choice."""
        return self.n > 1

    @property
    def intermediate(self) -> bool:
        """Whether predictions are judged."""
        return self.n > 1 and bool(self.checks)

    def check_recipe(self, recipe: Any) -> None:
        """Steps are counted, so times must fall."""
        refuse_travel(recipe)

    def _plan(self, steps: int) -> list[tuple[int, int, int]]:
        """(first step, one past the last, candidates) of every stretch."""
        cuts = sorted({min(steps, math.ceil(c * steps - 1e-9)) for c in self.checks} - {steps})
        stretches, count = [], self.n
        for first, last in zip([0, *cuts], [*cuts, steps], strict=True):
            stretches.append((first, last, count))
            count = max(1, math.ceil(count / self.factor - 1e-9))
        return stretches

    def account(self, evaluations: Sequence[int]) -> Account:
        """The steps of the candidates that are there."""
        plan = self._plan(len(evaluations))
        nfe = sum(count * sum(evaluations[first:last]) for first, last, count in plan)
        calls = sum(count for _, _, count in plan) if self.n > 1 else 0
        return Account(nfe, calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, candidates that finished) and ``slot`` (B,), the winner's number of N."""
        if self.n == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide, streams = sampler.repeat(self.n), noise.repeat(self.n)
        state, plan = wide.start(streams), self._plan(sampler.num_steps)
        names = streams.slots.view(-1, self.n)  # type: ignore[attr-defined]
        for number, (first, last, count) in enumerate(plan):
            for _ in range(first, last):
                state = wide.step(state, streams)
            if number + 1 == len(plan):
                break
            rewards = judge(wide, reward, state.x0_hat, streams.at(last - 1)).view(-1, count)
            stay = rewards.argsort(dim=1, descending=True, stable=True)[:, : plan[number + 1][2]].sort(dim=1).values
            rows = rows_of(stay, count)
            # A candidate keeps its own stream: pruning the others changes nothing about it.
            wide, streams, state = wide.select(rows), reindex(streams, rows), reindex(state, rows)
            names = names.gather(1, stay)
        count = plan[-1][2]
        rewards = reward(wide.model.decode(state.x, wide.cond), wide.cond).view(-1, count)
        best = rewards.argmax(dim=1, keepdim=True)
        x0 = reindex(state.x, rows_of(best, count))
        return Samples(x0, {"candidate_rewards": rewards, "slot": names.gather(1, best)[:, 0]})
