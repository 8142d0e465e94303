"""Soft value-based decoding: each trajectory chooses among its children."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks import kernels, smc
from tasks.account import Account
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples, State, reindex

VALUES = ("posterior_mean", "monte_carlo")
SELECTIONS = ("softmax", "argmax")

# (children, their clean predictions, streams of the rows) -> log-values (B M,); at the end predictions are states.
Value = Callable[[State, Tensor, Any], Tensor]


@strategies.register("svdd")
@dataclass(frozen=True)
class SVDD:
    """Soft value-based decoding: at every step draw M children of the state and keep one by its soft value.

    A child x_s is kept with probability ``proportional to exp(v(x_s))``, where v stands for the soft value ``log
    E[exp(strength r(x_0)) | x_s]``:

    * ``posterior_mean``: ``v = strength r(x0_hat(x_s))``. The reward of the mean is not the soft value: this bias
      (Jensen's gap) does not vanish for any number of children.
    * ``monte_carlo``: ``v = log mean exp(strength r)`` over rollouts of the child to the end by the same solver:
      unbiased in exp v, exact as rollouts grow.

    With the exact value the samples go to ``p(x_0) exp(strength r(x_0)) / Z`` as M grows, with a bias of O(1/M).
    Trajectories are independent: nothing collapses onto one ancestor, but there is no estimate of Z either.

    Args:
        children: M.
        strength: inverse temperature; 1/alpha of the paper.
        selection: argmax (as published for images: a greedy optimiser that collapses onto modes of the value) or
            softmax.
        value: posterior_mean or monte_carlo.
        rollouts: trajectories from each child, for monte_carlo.
        predictions: clean guesses that posterior_mean draws of tokens, whose prediction is a distribution; ``log mean
            exp(strength r)`` over them is the value.
        select_last: choose among M children of the last step too, by their own rewards; useful where that step draws.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Li et al. 2024, "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft
        Value-Based Decoding". Their Monte-Carlo value is a network fitted to E[r | x_t]; the mean of exp here is the
        soft value itself.
    Cost: posterior_mean ``M (T - 1) + 1`` evaluations for T steps, since the prediction that scored a child steps it;
        monte_carlo further ``M rollouts (T - 1) (T - 2) / 2``. ``M (T - 1)`` rewards (times predictions or rollouts),
        and M with select_last.
    Identities: with children=1 this is ``single``, draw for draw.
    """

    children: int = 10
    strength: float = 10.0
    selection: str = "argmax"
    value: str = "posterior_mean"
    rollouts: int = 1
    predictions: int = 1
    select_last: bool = False
    budget: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.children < 1 or self.rollouts < 1 or self.predictions < 1:
            raise ValueError(
                "strategy.children, strategy.rollouts and strategy.predictions must be at least 1, got "
                f"{self.children}, {self.rollouts} and {self.predictions}."
            )
        if not self.strength > 0:
            raise ValueError(
                f"strategy.strength must be positive, got {self.strength}. To prefer small rewards, negate them."
            )
        if self.selection not in SELECTIONS:
            raise unknown("selection", self.selection, list(SELECTIONS), "Allowed")
        if self.value not in VALUES:
            raise unknown("value", self.value, list(VALUES), "Allowed")

    @property
    def particles(self) -> int:
        """M children, each with its rollouts."""
        return self.children * (self.rollouts if self.value == "monte_carlo" and self.children > 1 else 1)

    @property
    def uses_reward(self) -> bool:
        """One child needs no choice."""
        return self.children > 1

    @property
    def intermediate(self) -> bool:
        """Clean predictions are judged; rollouts are whole samples."""
        return self.children > 1 and self.value == "posterior_mean"

    @property
    def branches(self) -> bool:
        """Children of one state differ by their noise."""
        return self.children > 1

    @property
    def semantics(self) -> str:
        """A (biased) draw from the tilted law, or a greedy optimum."""
        return "sample" if self.selection == "softmax" else "best"

    @property
    def bias(self) -> str:
        """What no number of children takes away."""
        return "the reward of the mean is not the soft value" if self.value == "posterior_mean" else ""

    def account(self, evaluations: Sequence[int]) -> Account:
        """What T steps of one chain spend, with every prediction used twice."""
        m, steps = self.children, len(evaluations)
        if m == 1:
            return Account(sum(evaluations))
        # A prediction per child at the nodes 1 to T - 1, and one at the start.
        spent = evaluations[0] + m * sum(evaluations[1:])
        each = self.predictions
        if self.value == "monte_carlo":
            each = self.rollouts
            spent += m * self.rollouts * sum(sum(evaluations[node + 1 :]) for node in range(1, steps))
        calls = m * (steps - 1) * each + (m if self.select_last else 0)
        return Account(spent, calls, calls)

    def check_recipe(self, recipe: Any) -> None:
        """Refuse solvers whose steps cannot use the prediction that scored a child."""
        if self.children > 1:
            kernels.check_asks_once(recipe)
        if self.predictions > 1 and recipe.parts.model.noising.kind == "gaussian":
            raise ValueError(
                f"strategy.predictions={self.predictions}, but a Gaussian process predicts one point. Use 1."
            )

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with the column ``ess`` (B, choices), the effective number of children of each choice."""
        if self.children == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide = sampler.repeat(self.children)
        value = self._rollout_value(sampler, reward) if self.value == "monte_carlo" else self._mean_value(wide, reward)
        return self.decode(sampler, value, noise)

    def decode(self, sampler: Any, value: Value, noise: Any) -> Samples:
        """Run the chains with a given value of children."""
        m, steps = self.children, sampler.num_steps
        wide, streams = sampler.repeat(m), noise.repeat(m)
        state = sampler.start(noise)
        x0_hat = sampler.model.denoise(state.x, sampler.times[0], sampler.cond)
        rows = torch.arange(len(state.x), device=state.x.device)
        sizes = []
        for i in range(steps):
            last = i == steps - 1
            if last and not self.select_last:
                state = kernels.primed(sampler, state.x, x0_hat).step(state, noise)
                break
            copies = rows.repeat_interleave(m)
            parents, known = reindex((state, x0_hat), copies)
            children = kernels.primed(wide, parents.x, known).step(parents, streams)
            found = children.x if last else wide.model.denoise(children.x, wide.times[i + 1], wide.cond)
            log_v = value(children, found, noise).view(-1, m)
            if self.selection == "argmax":
                slot = log_v.argmax(1)
            else:
                cumulative = smc.normalised(log_v).cumsum(1)
                drawn = noise.at(i).uniform((1,), "select") * cumulative[:, -1:]
                slot = (cumulative <= drawn).sum(1).clamp_(max=m - 1)
            sizes.append(smc.effective_size(log_v))
            state, x0_hat = reindex((children, found), rows * m + slot)
        columns = {"ess": torch.stack(sizes, dim=1)} if sizes else {}
        return Samples(state.x, columns)

    def _mean_value(self, wide: Any, reward: Reward) -> Value:
        def value(children: State, x0_hat: Tensor, noise: Any) -> Tensor:
            if children.step == wide.num_steps:
                return self.strength * reward(wide.model.decode(children.x, wide.cond), wide.cond).double()
            found = []
            for k in range(self.predictions):
                streams = noise.repeat(self.children).at(children.step).shifted(k * self.children)
                guess = wide.model.process.readout(x0_hat, streams)
                found.append(reward(wide.model.decode(guess, wide.cond), wide.cond).double())
            return smc.log_mean_exp(self.strength * torch.stack(found, dim=1))

        return value

    def _rollout_value(self, sampler: Any, reward: Reward) -> Value:
        total = self.children * self.rollouts
        wide, many = sampler.repeat(self.children), sampler.repeat(total)

        def value(children: State, x0_hat: Tensor, noise: Any) -> Tensor:
            if children.step == sampler.num_steps:
                return self.strength * reward(wide.model.decode(children.x, wide.cond), wide.cond).double()
            # Rollouts have slots of their own: with the children's they would foresee the noise of the steps to come.
            own = noise.repeat(total).shifted(self.children + children.step * total)
            copies = torch.arange(len(children.x), device=children.x.device).repeat_interleave(self.rollouts)
            state, known = reindex((children, x0_hat), copies)
            state = kernels.primed(many, state.x, known).step(state, own)
            while state.step < sampler.num_steps:
                state = many.step(state, own)
            rewards = reward(many.model.decode(state.x, many.cond), many.cond).double()
            return smc.log_mean_exp(self.strength * rewards.view(-1, self.rollouts))

        return value
