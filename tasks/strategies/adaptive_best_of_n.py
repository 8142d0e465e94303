"""Best of as many as it pays to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.budgets import Meter, affordable
from tasks.registry import strategies
from tasks.reservation import reservation
from tasks.types import Noise, Reward, Samples, reindex


@strategies.register("adaptive_best_of_n")
@dataclass(frozen=True)
class AdaptiveBestOfN:
    """Draw samples one after another until another one would cost more than it is expected to gain.

    A row stops when its best reward reaches the reservation value z, ``E[(R - z)_+] = cost``. R is normal with the mean
    and spread of the row's rewards so far, shrunk towards a prior that counts as ``prior_weight`` rewards.

    Rows of a batch stop at different times. Places that become free run the next candidates of the rows that go on;
    what turns out not to be needed is dropped and not charged, so a row does not depend on its neighbours.

    Args:
        cost: what one more sample costs, in units of the reward.
        max_n: most candidates of a row.
        min_n: fewest candidates of a row.
        mean: prior mean of the reward.
        std: prior standard deviation of the reward.
        prior_weight: how many rewards the prior counts as; a large number means that the law is known.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Weitzman 1979, "Optimal search for the best alternative" (Pandora's rule).
    Cost: between min_n and max_n trajectories and reward calls, each row its own (columns ``nfe``, ``reward_calls``).
    Identities: with max_n=1 this is ``single``; candidate k is that of ``best_of_n``; for a known law and no limit the
        expected best reward less the cost is z.
    """

    cost: float = 0.1
    max_n: int = 16
    min_n: int = 1
    mean: float = 0.0
    std: float = 1.0
    prior_weight: float = 4.0
    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    branches = False
    intermediate = False
    adapts = ("nfe", "reward_calls", "decodes")
    semantics = "best"

    def __post_init__(self) -> None:
        if self.cost <= 0 or self.std <= 0 or self.prior_weight <= 0:
            raise ValueError(
                "adaptive_best_of_n needs cost, std and prior_weight above 0, got "
                f"{self.cost}, {self.std} and {self.prior_weight}."
            )
        if not 1 <= self.min_n <= self.max_n:
            raise ValueError(f"adaptive_best_of_n needs 1 <= min_n <= max_n, got {self.min_n} and {self.max_n}.")

    @property
    def uses_reward(self) -> bool:
        """A single candidate needs no choice."""
        return self.max_n > 1

    def account(self, evaluations: Sequence[int]) -> Account:
        """At most max_n trajectories, or what the budget allows."""
        each = sum(evaluations)
        if self.max_n == 1:
            return Account(each)
        most = max(1, affordable(self.budget, self.max_n, each))
        return Account(most * each, most, most, exact=False)

    def _threshold(self, rewards: list[float]) -> float:
        """The reservation value after some rewards."""
        count, w = len(rewards), self.prior_weight
        mean = sum(rewards) / count
        within = sum((value - mean) ** 2 for value in rewards)
        square = w * self.std**2 + within + w * count / (w + count) * (mean - self.mean) ** 2
        fitted = (w * self.mean + count * mean) / (w + count)
        return reservation(fitted, math.sqrt(square / (w + count)), self.cost)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``slot``, ``reward_calls``, ``nfe``, ``threshold`` (B,); ``candidate_rewards`` (B, max_n), NaN."""
        if self.max_n == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        places = noise.num_rows
        most, each = self.max_n, 0
        found: list[list[float]] = [[] for _ in range(places)]  # rewards in order
        threshold, slot = [float("inf")] * places, [0] * places
        best: Tensor | None = None
        drawn, going = [0] * places, dict.fromkeys(range(places))  # in order, and quick to leave
        while going:
            rows, slots, charged = self._assign(list(going), drawn, places, most)
            index = torch.tensor(rows, dtype=torch.int64, device=noise.device)  # type: ignore[attr-defined]
            streams = reindex(noise, index).slot(torch.tensor(slots, dtype=torch.int64, device=index.device))
            part, meter = sampler.select(index), Meter(sampler)
            x0 = part.run(streams).x
            rewards = reward(sampler.model.decode(x0, part.cond), part.cond)
            if best is None:
                best, each = x0.clone(), meter.per(places)
                most = max(1, affordable(self.budget, self.max_n, each))
            for place in charged:
                row = rows[place]
                if row not in going or slots[place] >= most:
                    continue
                value = float(rewards[place])
                if not found[row] or value > max(found[row]):
                    best[row], slot[row] = x0[place], slots[place]
                found[row].append(value)
                if len(found[row]) >= self.min_n:
                    threshold[row] = self._threshold(found[row])
                if max(found[row]) >= threshold[row] or len(found[row]) >= most:
                    del going[row]
        assert best is not None
        count = torch.tensor([len(values) for values in found], dtype=torch.int32, device=best.device)
        table = torch.full((places, self.max_n), torch.nan, dtype=torch.float64, device=best.device)
        for row, values in enumerate(found):
            table[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        columns = {
            "candidate_rewards": table,
            "slot": torch.tensor(slot, device=best.device),
            "threshold": torch.tensor(threshold, dtype=torch.float64, device=best.device),
            "reward_calls": count,
            "decodes": count,
            "nfe": count * each,
        }
        return Samples(best, columns)

    @staticmethod
    def _assign(going: list[int], drawn: list[int], places: int, most: int) -> tuple[list[int], list[int], list[int]]:
        """Row and candidate of every place of a batch, and the places that count, in order of the candidates."""
        rows, slots, charged = [], [], []
        for place in range(places):
            row = going[place % len(going)]
            if drawn[row] < most:
                charged.append(place)
                rows.append(row)
                slots.append(drawn[row])
                drawn[row] += 1
            else:
                rows.append(row)
                slots.append(drawn[row] - 1)
        return rows, slots, charged
