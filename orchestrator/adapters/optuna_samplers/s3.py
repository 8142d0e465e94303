"""S3: an evolution of whole solver schedules that a learned predictor guides."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.evolution import Evolution
from orchestrator.adapters.optuna_samplers.history import History, Point
from orchestrator.adapters.optuna_samplers.point_sampler import PointSampler
from orchestrator.adapters.optuna_samplers.points import Params, key_of
from orchestrator.adapters.optuna_samplers.predictor import Features, Predictor
from orchestrator.space import Space

_features: WeakKeyDictionary[Space, Features] = WeakKeyDictionary()
_stages: WeakKeyDictionary[Space, OrderedDict[Any, list[dict[str, Any]]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class S3Sampler(PointSampler):
    """Predictor-guided evolution of schedules in stages.

    The first stage is what the study begins with, filled up with random points. Every later one fits a predictor to all
    finished points, lets an evolution run on it from the best of them, and evaluates the points of largest expected
    improvement; a share is random. Without the predictor the same evolution proposes children of the best points
    directly.

    Args:
        space: what may be chosen.
        seed: of the whole search, the same for every trial.
        startup: trials before the first prediction.
        batch: evaluations of a stage.
        parents: how many of the best found points have children.
        pool: children of a generation on the predictor; of the first, a quarter are random points instead.
        generations: generations on the predictor.
        exploration: share of random points.
        predictor: whether a predictor chooses.

    Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models"
    (S3). Stage sizes and predictor are ours.
    Cost: one fit and ``pool * generations`` predictions a stage, about half a second in all.
    """

    startup: int = 16
    batch: int = 4
    parents: int = 4
    pool: int = 48
    generations: int = 2
    exploration: float = 0.05
    predictor: bool = True

    def __post_init__(self) -> None:
        for name in ("startup", "batch", "parents", "pool", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of S3 must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.exploration < 1:
            raise ValueError(f"exploration of S3 must be at least 0 and below 1, got {self.exploration}.")

    def propose(self, found: History) -> dict[str, Any]:
        """The next point."""
        generator = self.generator("point", found.position)
        first = found.position
        if self.predictor:  # a stage knows what was finished when it began
            first -= (found.position - self.startup) % self.batch
        known = found.before(first)
        if found.position < self.startup or len(known) < 2 or generator.uniform() < self.exploration:
            return self.new(found, lambda: self.space.sample(generator))
        if self.predictor and sum(point.is_exact for point in known) > 1:
            for params in self._stage(known, first):
                if not found.knows(key_of(self.space, params)):
                    return params
        parents = [point.params for point in history.best(known, self.parents)]
        return self.new(found, lambda: Evolution(self.space).child(parents, generator))

    def _stage(self, known: tuple[Point, ...], first: int) -> list[dict[str, Any]]:
        """The points of a stage, best first, kept so that only the first of its trials waits for them."""
        settings = tuple(getattr(self, f.name) for f in fields(self) if f.name != "space")
        evaluated = tuple((point.position, point.loss, key_of(self.space, point.params)) for point in known)
        stages = _stages.setdefault(self.space, OrderedDict())
        if (settings, first, evaluated) not in stages:
            stages[settings, first, evaluated] = self._evolved(known, first)
            while len(stages) > 8:
                stages.popitem(last=False)
        return stages[settings, first, evaluated]

    def _evolved(self, known: tuple[Point, ...], first: int) -> list[dict[str, Any]]:
        """Children that nobody ran, of the generations on a predictor, the most promising first."""
        generator = self.generator("stage", first)
        predictor = self.fitted(known, int(generator.integers(2**31)))
        taken = {key_of(self.space, point.params) for point in known if point.is_exact}
        parents = best = [point.params for point in history.best(known, self.parents)]
        children: list[dict[str, Any]] = []
        for generation in range(self.generations):
            for child in self.children(parents, generator, mixed=generation == 0):
                key = key_of(self.space, child)
                if key not in taken:
                    taken.add(key)
                    children.append(child)
            if not children:
                return []
            order = np.argsort(-predictor.improvement(children), kind="stable")
            parents = [*(children[i] for i in order[: self.parents]), *best[: (self.parents + 1) // 2]]
        return [children[i] for i in order]

    def children(self, parents: Sequence[Params], generator: np.random.Generator, mixed: bool) -> list[dict[str, Any]]:
        """A generation of the evolution; mixed, every fourth point is random instead."""
        evolution = Evolution(self.space)
        return [
            self.space.sample(generator) if mixed and i % 4 == 3 else evolution.child(parents, generator)
            for i in range(self.pool)
        ]

    def fitted(self, known: Sequence[Point], seed: int) -> Predictor:
        """The predictor that these points teach; two exact ones at least."""
        if self.space not in _features:
            _features[self.space] = Features(self.space)
        return Predictor(_features[self.space], known, seed)
