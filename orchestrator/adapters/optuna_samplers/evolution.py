"""Children of solver schedules: what a predictor-guided and a plain evolution have in common.

Crossing either takes whole decisions from one parent or the other (its grid, all its correctors), or goes through the
steps and takes each one's decisions from either. A mutation moves nodes and numbers, switches choices, and inserts or
deletes a step where the space searches the number of evaluations too.

Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models", and
the rates of its released evolution. Ours differ where a rate is applied to each of dozens of axes: one to
four of them change at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.adapters.optuna_samplers.nodes import RATIO, nodes_of, ratios_of, split
from orchestrator.adapters.optuna_samplers.points import Params, axes_of
from orchestrator.space import Axis, Space, same

ORDER_PRIOR = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}


@dataclass(frozen=True)
class Evolution:
    """Makes children.

    Args:
        space: where they live.
        crossover: how often a child has two parents.
        deep: how often these are crossed step by step instead of decision by decision.
        changes: about how many axes a mutation changes, one number drawn per child.
        widths: standard deviations, in units of an axis (nodes: of the logarithm of their time), one drawn per child:
            some children explore, some refine.
        resize: how often a step is inserted or deleted, where the space searches the number of evaluations.
    """

    space: Space
    crossover: float = 0.5
    deep: float = 0.5
    changes: tuple[float, ...] = (1.0, 2.0, 4.0)
    widths: tuple[float, ...] = (0.02, 0.08, 0.25)
    resize: float = 0.2

    def child(self, parents: Sequence[Params], generator: np.random.Generator) -> dict[str, Any]:
        """A child of one or two of the parents, the first of which are preferred."""
        axes = axes_of(self.space)
        a = self._choose(parents, generator)
        made: dict[str, Any] = dict(a)
        if len(parents) > 1 and generator.uniform() < self.crossover:
            made = self.cross(a, self._choose(parents, generator), generator)
            if generator.uniform() < 0.3:
                return self.space.completed(made, generator)
        return self.space.completed(self.mutate(made, axes, generator), generator)

    def _choose(self, parents: Sequence[Params], generator: np.random.Generator) -> Params:
        """A tournament of two over the order of the parents."""
        return parents[int(generator.integers(len(parents), size=2).min())]

    def cross(self, a: Params, b: Params, generator: np.random.Generator) -> dict[str, Any]:
        """A child with the size of the first parent."""
        is_deep = generator.uniform() < self.deep
        swapped: dict[Any, bool] = {}
        made = dict(a)
        for name in a:
            head, place = split(name)
            # The nodes of a grid belong together, whichever way the decisions of the steps are taken.
            unit = place if is_deep and place is not None and head != RATIO else head
            if unit not in swapped:
                swapped[unit] = bool(generator.uniform() < 0.5)
            if swapped[unit] and name in b and name != "nfe":
                made[name] = b[name]
        return made

    def mutate(self, params: Params, axes: Mapping[str, Axis], generator: np.random.Generator) -> dict[str, Any]:
        """A changed copy: never an unchanged one, unless rounding makes it so."""
        made = dict(params)
        if "nfe" in axes and generator.uniform() < self.resize:
            made = self._resized(made, axes, generator)
        names = [name for name in made if name in axes and name != "nfe"]
        if not names:
            return made
        width = float(generator.choice(self.widths))
        rate = float(generator.choice(self.changes)) / len(names)
        chosen = [name for name in names if generator.uniform() < rate]
        chosen = chosen or [str(generator.choice(names))]
        moved = {name for name in chosen if split(name)[0] == RATIO}
        if moved:
            made |= self._moved(made, moved, width, axes, generator)
        for name in chosen:
            if name not in moved:
                made[name] = self._changed(axes[name], made[name], width, generator)
        return made

    def _changed(self, axis: Axis, value: Any, width: float, generator: np.random.Generator) -> Any:
        if axis.choices is None:
            unit = axis.unit(value) + width * float(generator.normal())
            return axis.at(min(max(unit, 0.0), 1.0))
        others = [choice for choice in axis.choices if not same(choice, value)]
        if not others:
            return value
        prior = np.ones(len(others))
        if split(axis.name)[0] == "order":
            prior = np.array([ORDER_PRIOR.get(choice, 0.1) for choice in others])
        return others[int(generator.choice(len(others), p=prior / prior.sum()))]

    def _moved(
        self, params: Params, moved: set[str], width: float, axes: Mapping[str, Axis], generator: np.random.Generator
    ) -> dict[str, float]:
        """Half the time the nodes move alone, half the time all that follow move with them."""
        nodes = nodes_of(params)
        together = generator.uniform() < 0.5
        for i in range(len(nodes)):
            if f"{RATIO}.{i + 1}" in moved:
                factor = math.exp(width * 2.0 * float(generator.normal()))
                last = len(nodes) if together else i + 1
                nodes[i:last] = [min(other * factor, 0.999) for other in nodes[i:last]]
        return ratios_of(nodes, axes)

    def _resized(
        self, params: dict[str, Any], axes: Mapping[str, Axis], generator: np.random.Generator
    ) -> dict[str, Any]:
        """A step more or less, its neighbours' decisions kept."""
        allowed = axes["nfe"].choices or ()
        grows = bool(generator.uniform() < 0.5)
        nfe = params["nfe"] + (1 if grows else -1)
        if nfe not in allowed:
            return params
        nodes = nodes_of(params)
        at = int(generator.integers(len(nodes) + 1)) if grows else int(generator.integers(max(len(nodes), 1)))
        made: dict[str, Any] = {"nfe": nfe}
        for name, value in params.items():
            head, place = split(name)
            if place is None or head == RATIO:
                made.setdefault(name, value)
            elif grows:
                made[f"{head}.{place + (place > at)}"] = value
                if place == at:
                    made[f"{head}.{place + 1}"] = value
            elif place != at:
                made[f"{head}.{place - (place > at)}"] = value
        if nodes and grows:
            before = nodes[at - 1] if at else 1.0
            after = nodes[at] if at < len(nodes) else nodes[-1] * 0.5
            nodes.insert(at, math.sqrt(before * after))
        elif nodes:
            del nodes[at]
        made = {name: value for name, value in made.items() if split(name)[0] != RATIO}
        return made | ratios_of([n for i, n in enumerate(nodes) if f"{RATIO}.{i + 1}" in axes], axes)
