"""Rollover budget forcing: what one step leaves of its budget, the next may spend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.budgets import Meter, affordable
from tasks.interpolants import NAMES, predict, sde_step
from tasks.lookahead import refuse_travel, rows_of
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples


@strategies.register("rollover")
@dataclass(frozen=True)
class Rollover:
    """Rollover budget forcing (RBF) on flow models: search each step for a child better than all before, with a quota.

    Chains run side by side. Each begins with the best of ``first`` noises. A step draws children of the chain's state,
    one after another, looks at each and judges its clean prediction. A child that beats the chain's best reward so far
    is taken at once, and what is left of the quota goes to the next step; when the quota is spent the step's best child
    is taken. The last draw of children goes on until the budget ends, to the last evaluation. The best chain's sample,
    the prediction at its last time, is returned. Children differ because the flow is run as an SDE, along its own
    straight path or a variance-preserving one, which has more variety early (``tasks/interpolants.py``). The recipe's
    times are used, and its solver is not, except where there is no choice.

    Args:
        max_nfe: predictions of one sample; each is a network evaluation (two with classifier-free guidance) and a
            reward call.
        chains: chains B that share them equally.
        first: noises tried at the start of each chain.
        path: linear or vp.
        norm: diffusion at time 1; g(t) = norm t^power.
        power: how fast the diffusion falls.
        warp: whether times are moved to ``sqrt(1 - (1 - t)^2)``, longer among the noise.
        budget: caps per sample: nfe, reward_calls, decodes, seconds; lowers max_nfe.

    Reference: Kim et al. 2025, "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget
        Forcing", algorithm 1. There the quota counts T steps; here T - 1, since the last prediction is the sample.
    Cost: exactly max_nfe evaluations (times those of guidance) and reward calls.
    Identities: with a budget of one trajectory this is ``single``; quotas spent and left over add up to the budget.
    """

    max_nfe: int = 100
    chains: int = 2
    first: int = 5
    path: str = "vp"
    norm: float = 3.0
    power: float = 2.0
    warp: bool = True
    budget: dict[str, float] = field(default_factory=dict)

    adapts = ("nfe", "reward_calls", "decodes")
    semantics = "best"
    branches = False  # it makes its own steps stochastic

    def __post_init__(self) -> None:
        if self.path not in NAMES:
            raise unknown("path", self.path, list(NAMES), "Allowed")
        if min(self.max_nfe, self.chains, self.first) < 1 or self.norm < 0 or self.power <= 0:
            raise ValueError(
                "rollover needs max_nfe, chains and first of at least 1, norm >= 0 and power > 0, got "
                f"{self.max_nfe}, {self.chains}, {self.first}, {self.norm} and {self.power}."
            )

    @property
    def particles(self) -> int:
        """The noises of the start, which are looked at together."""
        return self.chains * self.first

    uses_reward = True
    intermediate = True

    def check_recipe(self, recipe: Any) -> None:
        """Only flow models, and a budget that reaches the data.

        Raises:
            ValueError: says what is wrong and what is allowed.
        """
        process = recipe.parts.model.noising
        if getattr(process, "kind_of_path", None) != "linear":
            raise ValueError(
                f"strategy rollover needs a flow model, but model {recipe.model['name']} has process "
                f"{type(process).__name__}. Use a flow model (process=flow), or strategy=beam."
            )
        refuse_travel(recipe)
        grid, _ = recipe.grid
        if recipe.initial["name"] != "prior" or grid[0] != 1.0 or grid[-1] != 0.0:
            raise ValueError(f"strategy rollover runs from pure noise to the data, but times are {list(grid)}.")
        self._quota(self.max_nfe, len(grid) - 1)

    def _quota(self, total: int, steps: int) -> int:
        """Predictions that every draw of children may use, before anything is carried over."""
        if self._is_single(total, steps):
            return 1
        moves = steps - 1
        quota = (total // self.chains - self.first) // moves if moves else 0
        if quota < 1:
            needed = self.chains * (self.first + moves)
            raise ValueError(
                f"strategy.max_nfe={total} cannot take {self.chains} chains of {steps} steps to the data, with "
                f"{self.first} noises each at the start: {max(needed, 2 * self.chains)} are needed, and two steps at "
                "least. Raise it (or strategy.budget.nfe), or lower strategy.chains, strategy.first or times.num_steps."
            )
        return quota

    def _is_single(self, total: int, steps: int) -> bool:
        return total == steps and self.chains == 1 and self.first == 1

    def account(self, evaluations: Sequence[int]) -> Account:
        """Every prediction of the budget."""
        total = affordable(self.budget, self.max_nfe, evaluations[0])
        return Account(total * evaluations[0], total, total)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, chains), ``slot`` (B,), ``quota_used`` and ``accepted`` (B, T - 1)."""
        steps, chains = sampler.num_steps, self.chains
        if self._is_single(self.max_nfe, steps):
            return Samples(sampler.run(noise).x)
        assert reward is not None
        shape, device = tuple(sampler.model.shape), noise.device  # type: ignore[attr-defined]
        times = torch.tensor(sampler.times, dtype=torch.float64, device=device)
        if self.warp:
            times = torch.sqrt(1 - (1 - times) ** 2)

        def ask(wide: Any, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            x0_hat = predict(wide.model, self.path, x, r, wide.cond)
            return x0_hat, reward(wide.model.decode(x0_hat, wide.cond), wide.cond).double()

        begun, meter = sampler.repeat(chains * self.first), Meter(sampler)
        x = noise.repeat(chains * self.first).at(-1).normal(shape, purpose="prior")
        x0_hat, best = ask(begun, x, times[:1].expand(len(x)))
        total = affordable(self.budget, self.max_nfe, meter.per(len(x)))
        quota = self._quota(total, steps)
        best, place = best.view(-1, self.first).max(dim=1)  # of each chain
        rows = rows_of(place[:, None], self.first)
        x, x0_hat = x[rows], x0_hat[rows]

        count, moves = len(x), steps - 1
        step = torch.zeros(count, dtype=torch.int64, device=device)
        allowed, used = torch.full_like(step, quota), torch.zeros_like(step)
        child, child_x0, child_reward = x.clone(), x0_hat.clone(), torch.full_like(best, -torch.inf)
        spent = torch.zeros(count, moves, dtype=torch.int64, device=device)
        accepted = torch.zeros(count, moves, dtype=torch.bool, device=device)
        wide, streams = sampler.repeat(chains), noise.repeat(chains)
        shares = [total // chains + (c < total % chains) - self.first for c in range(chains)]
        for turn in range(max(shares)):
            # All rows have the same shares, so which chains still draw does not depend on a row.
            on = torch.tensor([share > turn for share in shares], device=device).repeat(count // chains).nonzero()[:, 0]
            i = step[on]
            r, s = times[i], times[i + 1]
            z = streams.at(turn).normal(shape, purpose="step")[on]
            new = sde_step(self.path, x[on], x0_hat[on], r, s, self.norm * r**self.power, z)
            new_x0, value = ask(wide.select(on), new, s)
            used[on] += 1
            spent[on, i] += 1
            better = on[value > child_reward[on]]
            child[better], child_x0[better] = new[value > child_reward[on]], new_x0[value > child_reward[on]]
            child_reward[better] = value[value > child_reward[on]]
            open_ended = i == moves - 1
            take = (value > best[on]) & ~open_ended
            go = (take | (used[on] >= allowed[on])) & ~open_ended
            accepted[on[take], i[take]] = True
            best[on[take]] = value[take]
            gone = on[go]
            carried = torch.where(take[go], allowed[gone] - used[gone], 0)
            x[gone], x0_hat[gone] = child[gone], child_x0[gone]
            step[gone] += 1
            allowed[gone], used[gone], child_reward[gone] = quota + carried, 0, -torch.inf
        rewards = child_reward.view(-1, chains)
        slot = rewards.argmax(dim=1)
        columns = {
            "candidate_rewards": rewards,
            "slot": slot,
            "quota_used": spent.view(-1, chains, moves).sum(1),
            "accepted": accepted.view(-1, chains, moves).sum(1),
        }
        return Samples(child_x0[rows_of(slot[:, None], chains)], columns)
