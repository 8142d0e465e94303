"""Least squares on the rows of the trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from orchestrator import rows
from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import EXTENT, SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space
from orchestrator.store import Store
from tasks import registry
from tasks.types import sample_shape

OBJECTIVE = "quality/trajectory_error"


@searches.register("least_squares")
@dataclass(frozen=True)
class LeastSquares(OptunaSpec):
    """Levenberg-Marquardt on the trajectory error, from the best baselines: it reads what every sample is off.

    For numbers alone (space ``trajectory`` or ``velocity``) and the objective quality/trajectory_error. Around the best
    point every axis is moved once, a trial each; from their rows it knows where to go. Choices stay those of the start.
    Only baselines race: of its own trials it compares all samples.

    Args:
        probe: how far an axis is moved to find a derivative, as a fraction of it.

    Reference: Marquardt 1963, "An Algorithm for Least-Squares Estimation of Nonlinear Parameters".
    """

    objective: str = OBJECTIVE
    probe: float = 0.003

    races_proposals: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several or self.objective != OBJECTIVE:
            raise ValueError(
                f"search least_squares reads how far samples are from their many-step solutions, so its objective is "
                f"{OBJECTIVE}, got {', '.join(self.targets())}. Use turbo for other values, nsga2 for several."
            )
        if not 1e-4 <= self.probe <= 0.25:
            raise ValueError(f"search.probe must lie between 0.0001 and 0.25, got {self.probe}.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Our own sampler."""
        from orchestrator.adapters.optuna_samplers import LeastSquaresSampler

        count = int(self.set.get("num_samples", context.num_samples))
        first = int(self.set.get("first_index", context.first_index))
        found = Deviations(space, self.set, context, first)
        return LeastSquaresSampler(space, seeds.search, deviations=found, rows=count, probe=self.probe)


@dataclass(frozen=True)
class Deviations:
    """Reads how far the samples of a point are from the many-step solutions of their starting noise.

    Args:
        space: of the points.
        set: overrides that every trial shares.
        context: the study's recipe, metrics and root.
        first: index of a trial's first sample.
    """

    space: Space
    set: Mapping[str, Any]
    context: SearchContext
    first: int
    _store: Store = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_store", Store(self.context.root, create=False))

    def __call__(self, params: Mapping[str, Any], start: int, stop: int) -> np.ndarray:
        """Sample minus solution of the rows [start, stop) of a trial, (rows, elements).

        Raises:
            KeyError: they are not in the store.
        """
        made = {k: v for k, v in {**self.set, **self.space.decode(params)}.items() if k not in EXTENT}
        recipe = self.context.recipe.override(made)
        spec = next(m for m in self.context.metrics if registry.metrics.build(m).better.get(OBJECTIVE))
        other = recipe.companion(registry.metrics.build(spec).needs()[0])
        shape = sample_shape(recipe.parts.model)
        a, b = (self._samples(key, shape, self.first + start, self.first + stop) for key in (recipe.key, other.key))
        return (a - b).reshape(stop - start, -1)

    def _samples(self, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return np.concatenate([rows.samples(table, shape) for table in self._store.read("rows", key, start, stop)])
