"""A tree of trajectories that share their beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.lookahead import look, move, refuse_other_solvers, rows_of
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, reindex


@strategies.register("tree")
@dataclass(frozen=True)
class Tree:
    """Prefix-sharing tree: deterministic steps for all, then steps at which every node gets b children, then tails.

    ``prefix`` steps of one trajectory, ``depth`` stochastic steps that branch, whose noise grows from level to level as
    ``eta (j + 1) / depth`` for j = 0 .. depth - 1, and deterministic steps to b^depth leaves; the best leaf is
    returned. A node's value is the mean reward of the leaves below it, and its advantage the difference to the mean of
    its siblings: relative rewards for reinforcement learning, at the price of a tree.

    Args:
        prefix: shared deterministic steps.
        depth: branching steps.
        branching: children b of each node.
        eta: the solver's ``eta`` at the last branching step; its own eta is not used.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Fu et al. 2025, "Dynamic-TreeRPO: Breaking the Independent Trajectory Bottleneck with Structured
        Sampling" (the sampling part; no code is public, so the growth of the noise is from the text).
    Cost: ``prefix + sum_{j < depth} b^j + b^depth (T - prefix - depth)`` evaluations and b^depth reward calls.
    Identities: with depth=0 this is ``single``; with branching=1 it is a single trajectory of the solver.
    """

    prefix: int = 0
    depth: int = 2
    branching: int = 2
    eta: float = 1.0
    budget: dict[str, float] = field(default_factory=dict)

    intermediate = False
    semantics = "best"

    def __post_init__(self) -> None:
        if min(self.prefix, self.depth) < 0 or self.branching < 1 or self.eta <= 0:
            raise ValueError(
                "tree needs prefix >= 0, depth >= 0, branching >= 1 and eta > 0, got "
                f"{self.prefix}, {self.depth}, {self.branching} and {self.eta}."
            )

    @property
    def particles(self) -> int:
        """The leaves."""
        return self.branching**self.depth

    @property
    def uses_reward(self) -> bool:
        """A single leaf needs no choice."""
        return self.particles > 1

    branches = False  # it sets the solver's eta itself

    def check_recipe(self, recipe: Any) -> None:
        """Solvers with an ``eta`` only, and enough steps.

        Raises:
            ValueError: says what is wrong and what fits.
        """
        if self.depth == 0:
            return
        refuse_other_solvers(recipe)
        if not hasattr(recipe.parts.solver, "eta"):
            raise ValueError(
                f"strategy tree sets the noise of every step through the solver's eta, but solver "
                f"{recipe.solver['name']} has none. Use solver=ddim, or flow_sde on a flow."
            )
        replace(recipe.parts.solver, eta=self.eta)
        steps = len(recipe.grid[0]) - 1
        if self.prefix + self.depth > steps - 1:
            raise ValueError(
                f"strategy tree branches at the steps {self.prefix} to {self.prefix + self.depth - 1}, but of {steps} "
                f"steps only the first {steps - 1} can: the last one draws no noise. Lower strategy.prefix or "
                "strategy.depth, or raise times.num_steps."
            )

    def account(self, evaluations: Sequence[int]) -> Account:
        """One look at every node."""
        nfe = sum(self._nodes(i) * each for i, each in enumerate(evaluations))
        calls = self.particles if self.particles > 1 else 0
        return Account(nfe, calls, calls)

    def _nodes(self, step: int) -> int:
        """Nodes that step number ``step`` starts from."""
        return int(self.branching ** min(max(step - self.prefix, 0), self.depth))

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, leaves), ``slot`` (B,), ``advantages`` (B, nodes), level by level."""
        if self.depth == 0:
            return Samples(sampler.run(noise).x)
        state = replace(sampler, solver=replace(sampler.solver, eta=self.eta)).start(noise)
        wide, streams = sampler, noise
        for i in range(sampler.num_steps):
            level = i - self.prefix
            inside = 0 <= level < self.depth
            solver = replace(sampler.solver, eta=self.eta * (level + 1) / self.depth if inside else 0.0)
            x0_hat = look(wide, state)
            if inside:
                copies = torch.arange(len(state.x), device=state.x.device).repeat_interleave(self.branching)
                state, x0_hat = reindex((state, x0_hat), copies)
                nodes = self._nodes(i + 1)
                wide, streams = sampler.repeat(nodes), noise.repeat(nodes)
            state = move(replace(wide, solver=solver), state, x0_hat, streams.at(i))
        if reward is None:
            return Samples(state.x)
        rewards = reward(sampler.model.decode(state.x, wide.cond), wide.cond).view(-1, self.particles)
        slot = rewards.argmax(dim=1)
        x0 = reindex(state.x, rows_of(slot[:, None], self.particles))
        return Samples(x0, {"candidate_rewards": rewards, "slot": slot, "advantages": self.advantages(rewards)})

    def advantages(self, rewards: Tensor) -> Tensor:
        """Each node's value less its siblings' mean: (B, b^depth) leaf rewards -> (B, b + b^2 + ... + b^depth)."""
        levels, values = [], rewards.double()
        for _ in range(self.depth):
            families = values.view(len(values), -1, self.branching)
            mean = families.mean(dim=2, keepdim=True)
            levels.append((families - mean).flatten(1))
            values = mean[..., 0]
        return torch.cat(levels[::-1], dim=1)
