"""Beam search over a stochastic solver's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.lookahead import foresee, judge, look, move, refuse_other_solvers, rows_of
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, reindex


@strategies.register("beam")
@dataclass(frozen=True)
class Beam:
    """Beam search: every survivor gets children, and the children with the best clean predictions survive.

    b survivors times w children a step; each child is looked at once, its prediction is judged, and the best b stay.
    The look is the first half of the child's next step. The last step is taken once by every survivor, and the best
    sample is kept.

    Args:
        width: survivors b.
        children: children w of each survivor.
        per_parent: most children of one parent that may survive, for diversity; 0 for no cap.
        widths: survivors in equal stretches of the steps, in place of ``width``: (8, 4, 2) is wide in the first third.
        branching: children in equal stretches of the steps, in place of ``children``.
        lookahead_steps: steps to the data by which a child is judged; 1 is its clean prediction.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Li et al. 2025, "Dynamic Search for Inference-Time Alignment in Diffusion Models" (DSearch: schedules of
        width and look-ahead).
    Cost: ``b + b w (T - 1)`` evaluations, ``lookahead_steps`` as many for the children, ``b w (T - 1) + b`` reward
        calls.
    Identities: with width=1 and children=1 this is ``single``, draw for draw; with children=1 and one width it is
        ``best_of_n``.
    """

    width: int = 2
    children: int = 4
    per_parent: int = 0
    widths: tuple[int, ...] = ()
    branching: tuple[int, ...] = ()
    lookahead_steps: int = 1
    budget: dict[str, float] = field(default_factory=dict)

    semantics = "best"

    def __post_init__(self) -> None:
        if min(self.width, self.children, self.lookahead_steps, *self.widths, *self.branching, 1) < 1:
            raise ValueError(
                "beam needs width, children, lookahead_steps, widths and branching of at least 1, got "
                f"{self.width}, {self.children}, {self.lookahead_steps}, {list(self.widths)}, {list(self.branching)}."
            )
        if self.per_parent < 0:
            raise ValueError(f"strategy.per_parent must be at least 0, got {self.per_parent}.")

    @property
    def particles(self) -> int:
        """The widest step's children."""
        return max(self.widths or (self.width,)) * max(self.branching or (self.children,))

    @property
    def uses_reward(self) -> bool:
        """One path needs no choice."""
        return self.particles > 1

    @property
    def intermediate(self) -> bool:
        """Whether predictions are judged."""
        return self.branches or len(set(self.widths)) > 1

    @property
    def branches(self) -> bool:
        """Whether a particle gets several children."""
        return max(self.branching or (self.children,)) > 1

    def check_recipe(self, recipe: Any) -> None:
        """Refuse solvers whose step cannot be cut in two, and look-ahead on tokens."""
        if self.particles > 1:
            refuse_other_solvers(recipe)
        if self.lookahead_steps > 1 and recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(
                f"strategy.lookahead_steps={self.lookahead_steps} needs a Gaussian model, but {recipe.model['name']} "
                f"is {recipe.parts.model.noising.kind}. Set strategy.lookahead_steps=1."
            )

    def _plan(self, steps: int) -> list[tuple[int, int]]:
        """(survivors, children of each) of every step; more survivors than candidates are not asked for."""
        plan: list[tuple[int, int]] = []
        for i in range(steps):
            width = (self.widths or (self.width,))[i * len(self.widths) // steps]
            children = (self.branching or (self.children,))[i * len(self.branching) // steps]
            most = min(plan[-1][1], self.per_parent or plan[-1][1]) * plan[-1][0] if plan else width
            plan.append((min(width, most), children))
        return plan

    def account(self, evaluations: Sequence[int]) -> Account:
        """One look at every child."""
        plan = self._plan(len(evaluations))
        nfe, calls = plan[0][0] * evaluations[0], plan[-1][0] if self.particles > 1 else 0
        for (width, children), (survivors, _), each in zip(plan[:-1], plan[1:], evaluations[1:], strict=True):
            judged = width * children > survivors
            nfe += width * children * each * (self.lookahead_steps if judged else 1)
            calls += width * children if judged else 0
        return Account(nfe, calls, calls)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, survivors), ``slot`` (B,)."""
        if self.particles == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        steps = sampler.num_steps
        plan = self._plan(steps)
        width = plan[0][0]
        wide, streams = sampler.repeat(width), noise.repeat(width)
        state = wide.start(streams)
        x0_hat = look(wide, state)
        for i in range(steps - 1):
            children, survivors = plan[i][1], plan[i + 1][0]
            total = width * children
            copies = torch.arange(len(state.x), device=state.x.device).repeat_interleave(children)
            wide, streams = sampler.repeat(total), noise.repeat(total)
            state = move(wide, reindex(state, copies), x0_hat[copies], streams.at(i))
            x0_hat = look(wide, state)
            if total > survivors:
                end = foresee(wide, state, x0_hat, self.lookahead_steps)
                rewards = judge(wide, reward, end, streams.at(i)).view(-1, total)
                rows = rows_of(self._keep(rewards, children, survivors), total)
                state, x0_hat = reindex((state, x0_hat), rows)
            width = survivors
        wide, streams = sampler.repeat(width), noise.repeat(width)
        x0 = move(wide, state, x0_hat, streams.at(steps - 1)).x
        rewards = reward(sampler.model.decode(x0, wide.cond), wide.cond).view(-1, width)
        slot = rewards.argmax(dim=1)
        return Samples(reindex(x0, rows_of(slot[:, None], width)), {"candidate_rewards": rewards, "slot": slot})

    def _keep(self, rewards: Tensor, children: int, survivors: int) -> Tensor:
        """The best children of each row, at most ``per_parent`` of one parent: (B, b w) -> (B, survivors)."""
        if self.per_parent:
            families = rewards.view(len(rewards), -1, children)
            place = families.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
            rewards = families.masked_fill(place >= self.per_parent, -torch.inf).flatten(1)
        return rewards.argsort(dim=1, descending=True, stable=True)[:, :survivors].sort(dim=1).values
