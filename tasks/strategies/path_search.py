"""Search over paths: noise samples partly again and denoise them in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.continuing import run_from
from tasks.lookahead import judge, refuse_travel, rows_of
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, State, reindex


@strategies.register("path_search")
@dataclass(frozen=True)
class PathSearch:
    """Search over paths: take N samples nearly to the data, noise and denoise them again and again, keep the best.

    N trajectories run to time ``start``. In every round each of them is carried forward by ``forward`` M times, each
    copy is denoised back by ``back`` (more than forward, so that rounds make progress), its clean prediction is judged,
    and the best N stay. The last round ends at the data, and the best sample is kept. Predictions are those that the
    last step of a round made anyway.

    Args:
        width: trajectories N that stay.
        children: copies M of each in a round; 0 for no rounds.
        start: time at which rounds begin.
        forward: time by which a copy is noised.
        back: time by which it is denoised.
        back_steps: equal solver steps of a round.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Ma et al. 2025, "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", section 3.
        They keep the forward and back intervals as here on a flow whose time is its noise level.
    Cost: ``N T + rounds N M back_steps`` evaluations for a solver of one a step; ``rounds N M`` reward calls.
    Identities: with children=0 this is ``best_of_n`` with N candidates, and with width=1 besides it is ``single``.
    """

    width: int = 2
    children: int = 5
    start: float = 0.11
    forward: float = 0.78
    back: float = 0.81
    back_steps: int = 5
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.width < 1 or self.children < 0 or self.back_steps < 1:
            raise ValueError(
                "path_search needs width >= 1, children >= 0 and back_steps >= 1, got "
                f"{self.width}, {self.children} and {self.back_steps}."
            )
        if not 0 < self.start < 1 or not 0 < self.forward < self.back or self.start + self.forward >= 1:
            raise ValueError(
                "path_search needs 0 < start < 1, 0 < forward < back and start + forward < 1, got "
                f"{self.start}, {self.forward} and {self.back}."
            )

    @property
    def particles(self) -> int:
        """N M."""
        return self.width * max(1, self.children)

    @property
    def uses_reward(self) -> bool:
        """One path needs no choice."""
        return self.particles > 1 or self.children > 0

    @property
    def intermediate(self) -> bool:
        """Whether predictions are judged."""
        return self.children > 0

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """(noisiest time, last time) of every round."""
        found, t = [], self.start
        while self.children and t > 0:
            down = max(t + self.forward - self.back, 0.0)
            found.append((t + self.forward, down if down > 1e-9 else 0.0))
            t = found[-1][1]
        return found

    def check_recipe(self, recipe: Any) -> None:
        """Refuse solvers whose cost depends on where a run ends, and times that rise."""
        refuse_travel(recipe)
        solver = recipe.parts.solver
        if self.children and (recipe.grid[1] is not None or solver.nfe(3) != 3 or getattr(solver, "adaptive", False)):
            raise ValueError(
                f"strategy path_search lays grids of its own for a solver of one evaluation a step, but solver is "
                f"{recipe.solver['name']}. Use solver=euler, ddim or dpmpp_2m."
            )

    def account(self, evaluations: Sequence[int]) -> Account:
        """The first run, and M copies of each in every round."""
        rounds, wide = len(self.intervals), self.width * self.children
        nfe = self.width * sum(evaluations) + rounds * wide * self.back_steps * evaluations[0]
        calls = rounds * wide if rounds else self.width * (self.width > 1)
        return Account(nfe, calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, last candidates), ``slot`` (B,)."""
        if not self.uses_reward:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide, streams, count = sampler.repeat(self.width), noise.repeat(self.width), self.width
        rounds = self.intervals
        if not rounds:
            state = wide.run(streams)
            rewards = reward(sampler.model.decode(state.x, wide.cond), wide.cond)
        else:
            first = wide.start(streams).x
            share = 1.0 - self.start / sampler.times[0]
            early = tuple(sampler.times[0] - (sampler.times[0] - t) * share for t in sampler.times[:-1])
            state = run_from(wide, first, streams, (*early, self.start))
        shift, t = sampler.num_steps, self.start
        for number, (up, down) in enumerate(rounds):
            copies = torch.arange(len(state.x), device=state.x.device).repeat_interleave(self.children)
            count = self.width * self.children
            wide, streams = sampler.repeat(count), noise.repeat(count)
            x = sampler.model.process.renoise(state.x[copies], t, up, streams.at(shift))
            grid = tuple(up + (down - up) * k / self.back_steps for k in range(self.back_steps)) + (down,)
            state = run_from(wide, x, streams, grid, shift)
            shift, t = shift + self.back_steps, down
            last = number + 1 == len(rounds)
            if last:
                rewards = reward(sampler.model.decode(state.x, wide.cond), wide.cond)
            else:
                rewards = judge(wide, reward, _prediction(state), streams.at(shift - 1))
                stay = rewards.view(-1, count).argsort(dim=1, descending=True, stable=True)[:, : self.width]
                state = State(reindex(state.x, rows_of(stay.sort(dim=1).values, count)))
        rewards = rewards.view(-1, count)
        slot = rewards.argmax(dim=1)
        x0 = reindex(state.x, rows_of(slot[:, None], count))
        return Samples(x0, {"candidate_rewards": rewards, "slot": slot})


def _prediction(state: State) -> Tensor:
    assert state.x0_hat is not None  # a step was taken
    return state.x0_hat
