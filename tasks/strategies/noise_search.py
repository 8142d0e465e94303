"""Search over the starting noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.budgets import Meter, affordable
from tasks.continuing import run_from
from tasks.lookahead import rows_of
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples

METHODS = ("random", "sphere", "vp")


@strategies.register("noise_search")
@dataclass(frozen=True)
class NoiseSearch:
    """Search for a starting noise whose sample has a large reward: at random, or near the best one so far.

    Round 0 runs the noise n that ``single`` would run; every further round tries ``candidates`` others and keeps the
    best of all. ``random`` draws them afresh. ``sphere`` (zero-order search) takes neighbours of equal length at a
    fixed angle, ``|n| (cosine u + sqrt(1 - cosine^2) w)`` with u = n / |n| and w a random unit vector orthogonal to it;
    ``vp`` takes ``(n + spread z) / sqrt(1 + spread^2)``, which leaves N(0, I) invariant. Where no neighbour improves,
    the next round starts from fresh noise (``restart``); the best of all rounds is returned.

    With a stochastic solver, neighbours share the noise of the steps, so that the reward is a function of the start.

    Args:
        method: random, sphere or vp.
        rounds: rounds after the first sample.
        candidates: candidates of the first of these rounds.
        growth: factor by which their number grows from round to round; 2 in the random search of some code.
        cosine: cosine of the angle between a noise and its neighbours (sphere).
        spread: size of the perturbation (vp).
        restart: whether a round without improvement starts afresh (sphere, vp).
        budget: caps per sample: nfe, reward_calls, decodes, seconds; no round begins that would exceed one.

    Reference: Ma et al. 2025, "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", section 3.
    Cost: a trajectory and a reward call for each candidate and for the first sample.
    Identities: with rounds=0 this is ``single``; ``random`` is ``best_of_n`` with as many candidates.
    """

    method: str = "sphere"
    rounds: int = 4
    candidates: int = 4
    growth: float = 1.0
    cosine: float = 0.95
    spread: float = 0.3
    restart: bool = True
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    intermediate = False
    adapts = ("nfe", "reward_calls", "decodes")
    semantics = "best"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, list(METHODS), "Allowed")
        if self.rounds < 0 or self.candidates < 1 or self.growth < 1:
            raise ValueError(
                "noise_search needs rounds >= 0, candidates >= 1 and growth >= 1, got "
                f"{self.rounds}, {self.candidates} and {self.growth}."
            )
        if not -1 < self.cosine < 1 or self.spread <= 0:
            raise ValueError(
                f"noise_search needs a cosine between -1 and 1 and spread > 0, got {self.cosine} and {self.spread}."
            )

    @property
    def _sizes(self) -> list[int]:
        """Candidates of every round after the first sample."""
        return [round(self.candidates * self.growth**i) for i in range(self.rounds)]

    @property
    def particles(self) -> int:
        """The largest round."""
        return max([1, *self._sizes])

    @property
    def uses_reward(self) -> bool:
        """A single noise needs no choice."""
        return self.rounds > 0

    def check_recipe(self, recipe: Any) -> None:
        """The starting noise must be the prior's.

        Raises:
            ValueError: another initial state, or tokens, whose starting state is no noise.
        """
        if recipe.parts.model.noising.kind != "gaussian" or recipe.initial["name"] != "prior":
            raise ValueError(
                f"strategy noise_search searches over Gaussian starting noise, but model {recipe.model['name']} is "
                f"{recipe.parts.model.noising.kind} and initial is {recipe.initial['name']}. Use a Gaussian model with "
                "initial=prior, or strategy=best_of_n."
            )
        if self.method == "sphere" and math.prod(recipe.parts.model.shape) < 2:
            raise ValueError(
                "strategy.method=sphere needs two dimensions at least, but the model has one. Use strategy.method=vp."
            )

    def _affordable(self, each: int) -> list[int]:
        """The rounds that the budget allows, given the evaluations of one trajectory."""
        sizes, total = [], 1
        for size in self._sizes:
            total += size
            if affordable(self.budget, total, each) < total:
                break
            sizes.append(size)
        return sizes

    def account(self, evaluations: Sequence[int]) -> Account:
        """A trajectory and a reward call for each candidate."""
        total = 1 + sum(self._affordable(sum(evaluations)))
        calls = total if self.rounds else 0
        return Account(total * sum(evaluations), calls, calls)

    def neighbours(self, pivot: Tensor, noise: Noise) -> Tensor:
        """Candidates near noises: (B, *shape) -> (B, *shape), one for each row of the streams."""
        draw = noise.normal(tuple(pivot.shape[1:]), purpose="neighbour")
        if self.method == "vp":
            return (pivot + self.spread * draw) / math.sqrt(1 + self.spread**2)
        flat = pivot.flatten(1).double()
        length = flat.norm(dim=1, keepdim=True)
        unit, other = flat / length, draw.flatten(1).double()
        other = other - (other * unit).sum(dim=1, keepdim=True) * unit
        other = other / other.norm(dim=1, keepdim=True)
        moved = length * (self.cosine * unit + math.sqrt(1 - self.cosine**2) * other)
        return moved.view(pivot.shape).to(pivot.dtype)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, all), ``slot`` (B,), ``search_curve`` (B, 1 + rounds), the best so far."""
        if self.rounds == 0:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        shape, std = tuple(sampler.model.shape), sampler.model.process.prior_std(sampler.times[0])

        def attempt(noises: Tensor, streams: Any, count: int) -> tuple[Tensor, Tensor]:
            wide = sampler.repeat(count)
            x0 = run_from(wide, std * noises, streams).x
            return x0, reward(sampler.model.decode(x0, wide.cond), wide.cond).view(-1, count)

        meter = Meter(sampler)
        pivot = noise.at(-1).normal(shape, purpose="prior")
        best_x0, rewards = attempt(pivot, noise, 1)
        best, pivot_reward, all_rewards, curve = rewards, rewards, [rewards], [rewards]
        slot, drawn = torch.zeros(len(pivot), dtype=torch.int64, device=pivot.device), 1
        for size in self._affordable(meter.per(len(pivot))):
            wide = noise.repeat(size)
            fresh = wide.slot(wide.slots + drawn)  # type: ignore[attr-defined]
            if self.method == "random":
                noises, streams = fresh.at(-1).normal(shape, purpose="prior"), fresh
            else:
                noises, streams = self.neighbours(pivot.repeat_interleave(size, dim=0), fresh.at(-1)), wide.slot(0)
            x0, rewards = attempt(noises, streams, size)
            top, place = rewards.max(dim=1, keepdim=True)
            rows, better = rows_of(place, size), (top > best)[:, 0]
            best_x0 = torch.where(_like(better, x0), x0[rows], best_x0)
            slot = torch.where(better, drawn + place[:, 0], slot)
            improves = (top > pivot_reward)[:, 0]
            other, lost = pivot, torch.full_like(top, -torch.inf)
            if self.restart:
                other = noise.slot(drawn).at(-1).normal(shape, purpose="restart")  # never judged itself
            pivot = torch.where(_like(improves, pivot), noises[rows], other)
            pivot_reward = torch.where(improves[:, None], top, lost if self.restart else pivot_reward)
            best, drawn = torch.maximum(best, top), drawn + size
            all_rewards.append(rewards)
            curve.append(best)
        columns = {"candidate_rewards": torch.cat(all_rewards, 1), "slot": slot, "search_curve": torch.cat(curve, 1)}
        return Samples(best_x0, columns)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.dim() - 1))
