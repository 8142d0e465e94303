"""Tree search over denoising steps with a soft backup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.account import Account
from tasks.budgets import affordable
from tasks.lookahead import move, refuse_other_solvers
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples, State, reindex

RULES = ("soft", "uct")


class _Tree:
    """The tree of one row. Node 0 is the root, before any noise is drawn; a node at depth d stands at time t_{d-1}."""

    def __init__(self) -> None:
        self.parent, self.depth, self.visits = [-1], [0], [0]
        self.children: list[list[int]] = [[]]
        self.value = [-math.inf]

    def add(self, parent: int) -> int:
        self.children[parent].append(len(self.parent))
        self.children.append([])
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.visits.append(0)
        self.value.append(-math.inf)
        return len(self.parent) - 1

    def visit(self, node: int) -> None:
        while node >= 0:
            self.visits[node] += 1
            node = self.parent[node]

    def back_up(self, leaf: int, value: float) -> None:
        self.value[leaf], node = value, self.parent[leaf]
        self.visit(leaf)
        while node >= 0:
            below = [self.value[child] for child in self.children[node]]
            top = max(below)
            self.value[node] = top + math.log(sum(math.exp(v - top) for v in below) / len(below))
            node = self.parent[node]


@strategies.register("tree_search")
@dataclass(frozen=True)
class TreeSearch:
    """Diffusion tree search (DTS, DTS*): grow a tree of denoising steps, with the soft value of what lies below a node.

    A node is a state. Descend from the root, choosing a child in proportion to ``exp(value)`` (rule ``soft``, DTS) or
    by the largest ``value + exploration sqrt(log N_parent / N_child)`` (rule ``uct``, DTS*); where a node has fewer
    children than ``widening N^power``, add one and roll it out to the data, keeping all states. A leaf's value is
    ``strength`` times its reward, and a node's ``log mean exp`` of its children's. Predictions are kept with the nodes,
    so only new nodes cost an evaluation. ``soft`` returns a leaf drawn by the values, ``uct`` the best leaf.

    The number of visits depends on the values, so the root's value is no estimate of log Z (it is too low) and is only
    reported as ``root_value``; ``soft`` approaches the tilted law only as the tree grows.

    Args:
        max_nfe: most new nodes, each a prediction; a rollout that would not reach the data is not begun.
        rule: soft or uct.
        strength: inverse temperature of the reward.
        exploration: weight of rarely visited children (uct).
        widening: factor of the number of children.
        power: its growth with the number of visits, between 0 and 1.
        budget: caps per sample: nfe, reward_calls, decodes, seconds; lowers max_nfe.

    Reference: Jain et al. 2025, "Diffusion Tree Sampling: Scalable Inference-Time Alignment of Diffusion Models".
    Cost: at most max_nfe evaluations (times those of guidance); one reward call a rollout.
    Identities: with max_nfe below two rollouts' the first rollout, which is ``single``, is all there is.
    """

    max_nfe: int = 64
    rule: str = "soft"
    strength: float = 1.0
    exploration: float = 1.0
    widening: float = 1.0
    power: float = 0.5
    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    adapts = ("nfe",)
    uses_reward = True
    intermediate = False
    branches = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown("rule", self.rule, list(RULES), "Allowed")
        if self.strength <= 0:
            raise ValueError(f"strategy.strength must be above 0, got {self.strength}.")
        if self.max_nfe < 1 or self.exploration < 0 or self.widening < 1 or not 0 < self.power <= 1:
            raise ValueError(
                "tree_search needs max_nfe >= 1, exploration >= 0, widening >= 1 and 0 < power <= 1, got "
                f"{self.max_nfe}, {self.exploration}, {self.widening} and {self.power}."
            )

    @property
    def semantics(self) -> str:
        """DTS samples, DTS* optimises."""
        return "sample" if self.rule == "soft" else "best"

    @property
    def bias(self) -> str:
        """What a tree of any one size has."""
        return "visits depend on the values" if self.rule == "soft" else ""

    def check_recipe(self, recipe: Any) -> None:
        """Solvers of one evaluation a step without a memory, and at least one whole rollout."""
        refuse_other_solvers(recipe, allow_memory=False)
        if recipe.parts.initial.evaluations:
            raise ValueError(
                f"strategy tree_search begins many trajectories of a row, but initial {recipe.initial['name']} costs "
                "evaluations. Use initial=prior."
            )
        steps = len(recipe.grid[0]) - 1
        if self.max_nfe < steps:
            raise ValueError(f"strategy.max_nfe={self.max_nfe} is less than one rollout of {steps} steps. Raise it.")

    def account(self, evaluations: Sequence[int]) -> Account:
        """At most max_nfe predictions; at most one rollout for every last step."""
        total = affordable(self.budget, self.max_nfe, evaluations[0], 0)
        rollouts = max(1, total - len(evaluations) + 1)
        return Account(total * evaluations[0], rollouts, rollouts, exact=False)

    def _descend(self, tree: _Tree, steps: int, draws: Tensor, room: int) -> int:
        """A node that may get one more child whose rollout takes at most ``room`` nodes; -1 at a last node."""
        node = 0
        while tree.depth[node] < steps:
            count, needed = len(tree.children[node]), steps - tree.depth[node]
            if count < self.widening * max(tree.visits[node], 1) ** self.power and needed <= room:
                return node
            if not count:
                break
            node = self._choose(tree, node, float(draws[tree.depth[node]]))
        tree.visit(node)
        return -1

    def _choose(self, tree: _Tree, node: int, u: float) -> int:
        children = tree.children[node]
        if self.rule == "soft":
            return _pick(tree, node, u)
        seen = math.log(max(tree.visits[node], 1))
        return max(
            children,
            key=lambda child: tree.value[child] + self.exploration * math.sqrt(seen / max(tree.visits[child], 1)),
        )

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``nfe``, ``reward_calls``, ``root_value``, ``leaf_reward``, all (B,)."""
        assert reward is not None
        steps, rows = sampler.num_steps, noise.num_rows
        times = torch.tensor(sampler.times, dtype=torch.float64)
        trees = [_Tree() for _ in range(rows)]
        leaves: list[dict[int, tuple[Tensor, float]]] = [{} for _ in range(rows)]
        spot, rollout, attempt = [-1] * rows, [0] * rows, [0] * rows  # the node to grow from; running numbers
        draws: dict[int, Tensor] = {}
        first = sampler.start(noise)
        shape = (rows, self.max_nfe + 1, *first.x.shape[1:])
        x = torch.zeros(shape, dtype=first.x.dtype, device=first.x.device)
        x0_hat: Tensor | None = None
        before, each, total, used = sampler.model.rows, 0, self.max_nfe, [0] * rows
        for _ in range(self.max_nfe):
            for row, tree in enumerate(trees):
                tries = 0
                while spot[row] < 0 and total - used[row] >= 1 and tries < 1000:
                    if attempt[row] not in draws:
                        draws[attempt[row]] = noise.at(attempt[row]).uniform((steps,), purpose="select")
                    spot[row] = self._descend(tree, steps, draws[attempt[row]][row], total - used[row])
                    attempt[row], tries = attempt[row] + 1, tries + 1
            growing = [row for row in range(rows) if spot[row] >= 0]
            if not growing:
                break
            nodes = {row: trees[row].add(spot[row]) for row in growing}
            depths = [trees[row].depth[nodes[row]] if row in nodes else 1 for row in range(rows)]
            slots = torch.tensor(rollout, dtype=torch.int64, device=x.device)
            new = self._states(sampler, noise.slot(slots), trees, nodes, depths, x, x0_hat)
            answer = sampler.model.denoise(new, times[torch.tensor(depths) - 1].to(x.device), sampler.cond)
            if x0_hat is None:
                x0_hat = torch.zeros((rows, self.max_nfe + 1, *answer.shape[1:]), dtype=answer.dtype, device=x.device)
                each = (sampler.model.rows - before) // rows
                total = affordable(self.budget, self.max_nfe, each, 0)
            for row in growing:
                x[row, nodes[row]], x0_hat[row, nodes[row]] = new[row], answer[row]
                used[row] += 1
            done = [row for row in growing if depths[row] == steps]
            if done:
                # Judged for all places of the batch, so that an answer does not depend on which rows finished with it.
                ends = self._ends(sampler, noise.slot(slots), new, answer, done)
                rewards = reward(sampler.model.decode(ends, sampler.cond), sampler.cond)
                for row in done:
                    leaves[row][nodes[row]] = (ends[row], float(rewards[row]))
                    trees[row].back_up(nodes[row], self.strength * float(rewards[row]))
                    rollout[row] += 1
            spot = [-1 if row in done or row not in nodes else nodes[row] for row in range(rows)]
        last = noise.uniform((steps,), purpose="choose")
        chosen = [self._leaf(tree, leaves[row], last[row]) for row, tree in enumerate(trees)]
        columns = {
            "leaf_reward": torch.tensor([leaves[r][n][1] for r, n in enumerate(chosen)], dtype=torch.float64),
            "root_value": torch.tensor([tree.value[0] for tree in trees], dtype=torch.float64),
            "nfe": torch.tensor([each * count for count in used], dtype=torch.int32),
            "reward_calls": torch.tensor(rollout, dtype=torch.int32),
            "decodes": torch.tensor(rollout, dtype=torch.int32),
        }
        return Samples(torch.stack([leaves[r][n][0] for r, n in enumerate(chosen)]), columns)

    @staticmethod
    def _states(
        sampler: Any, noise: Noise, trees: list[_Tree], nodes: dict[int, int], depths: list[int], x: Tensor, seen: Any
    ) -> Tensor:
        """The states of the new nodes: a draw of the prior below the root, else a step from the parent."""
        new = sampler.start(noise).x
        for depth in sorted({depths[row] for row in nodes} - {1}):
            group = torch.tensor([row for row in nodes if depths[row] == depth], device=x.device)
            parents = torch.tensor([trees[row].parent[nodes[row]] for row in group.tolist()], device=x.device)
            new[group] = _moved(sampler, noise, group, x[group, parents], seen[group, parents], depth - 2)
        return new

    @staticmethod
    def _ends(sampler: Any, noise: Noise, x: Tensor, x0_hat: Tensor, done: list[int]) -> Tensor:
        """The samples below last nodes; other places hold copies of one of them."""
        group = torch.tensor(done, device=x.device)
        moved = _moved(sampler, noise, group, x[group], x0_hat[group], sampler.num_steps - 1)
        ends = moved[:1].expand(len(x), *moved.shape[1:]).clone()
        ends[group] = moved
        return ends

    def _leaf(self, tree: _Tree, leaves: dict[int, tuple[Tensor, float]], draws: Tensor) -> int:
        """The leaf to return: the best, or one drawn by descending once more."""
        if self.rule == "uct":
            return max(leaves, key=lambda node: leaves[node][1])
        node = 0
        while tree.children[node]:
            node = _pick(tree, node, float(draws[tree.depth[node]]))
        return node


def _pick(tree: _Tree, node: int, u: float) -> int:
    """A child in proportion to exp(value)."""
    children = tree.children[node]
    top = max(tree.value[child] for child in children)
    weights = [math.exp(tree.value[child] - top) for child in children]
    left = u * sum(weights)
    for child, weight in zip(children, weights, strict=True):
        left -= weight
        if left < 0:
            return child
    return children[-1]


def _moved(sampler: Any, noise: Noise, rows: Tensor, x: Tensor, x0_hat: Tensor, step: int) -> Tensor:
    """Step number ``step`` of some rows whose predictions are known."""
    state = State(x, None, None, step)
    return move(sampler.select(rows), state, x0_hat, reindex(noise, rows).at(step)).x
