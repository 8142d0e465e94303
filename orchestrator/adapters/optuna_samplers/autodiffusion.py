"""AutoDiffusion: evolution of the time nodes, then of the layers that each step skips as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.history import History
from orchestrator.adapters.optuna_samplers.nodes import RATIO, SKIP, is_apart, nodes_of, ratios_of, split
from orchestrator.adapters.optuna_samplers.point_sampler import ATTEMPTS, PointSampler
from orchestrator.adapters.optuna_samplers.points import Params, axes_of, key_of


@dataclass(frozen=True, eq=False)
class AutoDiffusionSampler(PointSampler):
    """Two-stage evolution over time nodes (``ratio.i``) and bit masks of skipped blocks (``skip.i``).

    A generation of the first stage is made of mutants of the best points, of their crossings, and of random points; the
    first generation is the uniform grid, mutants of it and random points. Crossing takes a random subset of the union
    of both parents' nodes, a mutation replaces nodes. After ``time_generations``, or once a generation brings nothing
    better, masks may differ from 0: a node carries the mask of the step that begins there, mutations flip bits, and
    the share of skipped blocks is bounded by ``max_skip``, reached in ``growth`` equal parts. Other axes are inherited
    and mutated like the rest.

    Args:
        space: what may be chosen; it needs free nodes.
        seed: of the whole search, the same for every trial.
        population: evaluations of a generation.
        parents: how many of the best have children.
        mutants: mutants of a generation.
        crossovers: crossings of a generation; random points fill it up.
        mutation: probability that a node, a bit or another axis changes.
        first_mutation: the same for mutants of the uniform grid.
        time_generations: generations of the first stage, at most.
        max_skip: largest share of skipped blocks over all steps.
        growth: generations in which the bound grows to that.

    Reference: Li et al. 2023, "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
    Diffusion Model Acceleration". The released crossing takes each node from one parent or the other, which can give a
    node twice; the union cannot. A released mutation that is a comparison instead of an assignment changes nothing;
    here every mutant differs from its parent. Nodes are continuous.
    """

    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 15
    mutation: float = 0.25
    first_mutation: float = 0.1
    time_generations: int = 5
    max_skip: float = 0.1
    growth: int = 5

    def __post_init__(self) -> None:
        if f"{RATIO}.1" not in axes_of(self.space):
            raise ValueError(
                "AutoDiffusion searches free time nodes, but the space has none. Set search.space.schedule.times=free, "
                "with nfe of at least 2."
            )
        for name in ("population", "parents", "time_generations", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of AutoDiffusion must be at least 1, got {getattr(self, name)}.")
        if self.mutants < 0 or self.crossovers < 0 or self.mutants + self.crossovers > self.population:
            raise ValueError(
                f"mutants and crossovers of AutoDiffusion must fit its population of {self.population}, got "
                f"{self.mutants} and {self.crossovers}."
            )
        for name in ("mutation", "first_mutation", "max_skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} of AutoDiffusion must be a share between 0 and 1, got {getattr(self, name)}.")

    def propose(self, found: History) -> dict[str, Any]:
        """The next point."""
        generator = self.generator("point", found.position)
        generation, place = divmod(found.position, self.population)
        share = self._share(found, generation)
        known = found.before(generation * self.population)
        parents = [point.params for point in history.best(known, self.parents)]

        def draw() -> dict[str, Any]:
            if not parents:
                return self._first(place, generator)
            if place < self.mutants or (len(parents) < 2 and place < self.mutants + self.crossovers):
                return self._mutant(_any(parents, generator), self.mutation, share, generator)
            if place < self.mutants + self.crossovers:
                return self._crossed(_any(parents, generator), _any(parents, generator), share, generator)
            return self._bounded(self.space.sample(generator), share, generator)

        return self.new(found, draw, lambda params: self._bounded(params, share, generator))

    # --- the two stages ----------------------------------------------------------------------------------------------

    def _share(self, found: History, generation: int) -> float:
        """The share of blocks that may be skipped: 0 in the first stage, then growing."""
        if not any(split(name)[0] == SKIP for name in axes_of(self.space)):
            return 0.0
        second = self.time_generations
        for g in range(2, min(generation, self.time_generations) + 1):
            before = min((p.loss for p in found.before((g - 1) * self.population)), default=np.inf)
            if min((p.loss for p in found.before(g * self.population)), default=np.inf) >= before:
                second = g
                break
        return self.max_skip * min(max(generation - second + 1, 0) / self.growth, 1.0)

    def _bounded(self, params: Params, share: float, generator: np.random.Generator) -> dict[str, Any]:
        """A complete point that skips no more than its share: bits too many are switched off at random."""
        made = self.space.completed(params, generator)
        masks = [name for name in made if split(name)[0] == SKIP]
        bits = [(name, bit) for name in masks for bit in range(self._width(name)) if made[name] >> bit & 1]
        allowed = int(share * sum(self._width(name) for name in masks) + 1e-9)
        for i in generator.permutation(len(bits))[allowed:]:
            name, bit = bits[int(i)]
            made[name] ^= 1 << bit
        return made

    def _width(self, name: str) -> int:
        return int(axes_of(self.space)[name].high).bit_length()

    # --- points ------------------------------------------------------------------------------------------------------

    def _first(self, place: int, generator: np.random.Generator) -> dict[str, Any]:
        """The uniform grid first; after it half random points, half mutants of it."""
        made = self._bounded(self.space.middle() if place == 0 else self.space.sample(generator), 0.0, generator)
        if place % 2:
            return made
        count = len(nodes_of(made))
        uniform = [1.0 - i / (count + 1) for i in range(1, count + 1)]
        made = self._bounded(made | ratios_of(uniform, axes_of(self.space)), 0.0, generator)
        return made if place == 0 else self._mutant(made, self.first_mutation, 0.0, generator)

    def _crossed(self, a: Params, b: Params, share: float, generator: np.random.Generator) -> dict[str, Any]:
        """As many nodes as the first parent has, out of the union of both."""
        axes = axes_of(self.space)
        count = len(nodes_of(a))
        union: list[tuple[float, Any]] = []
        for parent in (a, b):
            for i, node in enumerate(nodes_of(parent), 1):
                if all(is_apart(node, other, axes) for other, _ in union):
                    union.append((node, parent.get(f"{SKIP}.{i}")))
        chosen = [union[int(i)] for i in generator.permutation(len(union))[:count]]
        made = dict(a)
        for name in a:  # decisions that are no nodes come from either parent
            if split(name)[0] != RATIO and name != "nfe" and name in b and generator.uniform() < 0.5:
                made[name] = b[name]
        return self._bounded(made | _in_order(chosen, axes), share, generator)

    def _mutant(self, params: Params, rate: float, share: float, generator: np.random.Generator) -> dict[str, Any]:
        """A copy that runs something else: what rounding or the bound on skips undo is tried again."""
        for _ in range(ATTEMPTS):
            made = self._bounded(self._changed(params, rate, share, generator), share, generator)
            if key_of(self.space, made) != key_of(self.space, params):
                break
        return made

    def _changed(self, params: Params, rate: float, share: float, generator: np.random.Generator) -> dict[str, Any]:
        axes = axes_of(self.space)
        genes = [name for name in params if name != "nfe" and (split(name)[0] != SKIP or share > 0)]
        chosen = [name for name in genes if generator.uniform() < rate] or [str(generator.choice(genes))]
        made = dict(params)
        nodes = nodes_of(params)
        for name in chosen:
            head, place = split(name)
            if head == RATIO and place is not None:
                others = [*nodes[: place - 1], *nodes[place:]]
                nodes[place - 1] = _free(others, axes, generator)
            elif head == SKIP:
                flips = [bit for bit in range(self._width(name)) if generator.uniform() < rate]
                for bit in flips or [int(generator.integers(self._width(name)))]:
                    made[name] ^= 1 << bit
            else:
                made[name] = axes[name].sample(generator)
        return made | _in_order([(node, made.get(f"{SKIP}.{i}")) for i, node in enumerate(nodes, 1)], axes)


def _in_order(nodes: Sequence[tuple[float, Any]], axes: Mapping[str, Any]) -> dict[str, Any]:
    """Nodes with the mask of the step that begins there, in any order, as parameters."""
    ordered = sorted(nodes, key=lambda node: -node[0])
    masks = {f"{SKIP}.{i}": mask for i, (_, mask) in enumerate(ordered, 1) if mask is not None}
    return masks | ratios_of([node for node, _ in ordered], axes)


def _free(others: Sequence[float], axes: Mapping[str, Any], generator: np.random.Generator) -> float:
    """A node, uniform in time, that is none of the others."""
    for _ in range(32):
        node = float(generator.uniform())
        if all(is_apart(node, other, axes) for other in others):
            break
    return node


def _any(parents: Sequence[Params], generator: np.random.Generator) -> Params:
    return parents[int(generator.integers(len(parents)))]
