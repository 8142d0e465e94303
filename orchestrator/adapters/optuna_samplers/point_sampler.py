"""What our samplers share: they propose whole points of a space, and only from what a study has finished.

Optuna's own samplers draw one parameter after another or ignore conditions. Ours answer with one complete point, in
which no axis is set that does not apply. A sampler keeps nothing between trials: the seed and the finished trials
determine the next point, so a search that is resumed proposes what an undisturbed one would have.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.history import History
from orchestrator.adapters.optuna_samplers.points import axes_of, every, key_of
from orchestrator.adapters.optuna_search.distributions import distribution
from orchestrator.space import Space, label

ATTEMPTS = 64  # at drawing a point that is new
LISTED = 4096  # points that are looked through after that, before a space counts as used up


@dataclass(frozen=True, eq=False)
class PointSampler(BaseSampler):
    """Proposes one complete point a trial.

    Args:
        space: what may be chosen.
        seed: of the whole search, the same for every trial.
    """

    space: Space
    seed: int

    @abstractmethod
    def propose(self, found: History) -> dict[str, Any]:
        """The parameters of the next point."""

    def generator(self, *purpose: object) -> np.random.Generator:
        """A stream of its own for every purpose."""
        text = "/".join(map(str, (self.seed, type(self).__name__, *purpose)))
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))

    def new(
        self,
        found: History,
        draw: Callable[[], dict[str, Any]],
        allowed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> dict[str, Any]:
        """A point that nobody tried: drawn, or else random, or else the next of all; one drawn where none is left.

        Args:
            found: what was tried.
            draw: draws a point.
            allowed: makes a point of the space one that may be proposed now.
        """
        generator = self.generator("new", found.position)
        drawn = (draw() for _ in range(ATTEMPTS))
        random = (allowed(self.space.sample(generator)) for _ in range(ATTEMPTS))
        rest = (allowed(params) for params in islice(every(self.space), LISTED))
        for params in chain(drawn, random, rest):
            if not found.knows(key_of(self.space, params)):
                return params
        return draw()

    # --- what Optuna asks --------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every axis that some point of the space has."""
        if len(study.directions) > 1:
            raise ValueError(
                f"{type(self).__name__} searches for one objective, but this study has {len(study.directions)}. Use "
                "NSGA-II, or give one objective."
            )
        return {axis.name: distribution(axis) for axis in axes_of(self.space).values()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point, as Optuna stores it."""
        params = self.propose(history.read(study, trial, self.space))
        return {name: label(value) for name, value in params.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform draw for an axis that the proposal left out: something else fixed the one that it depends on."""
        axes = axes_of(self.space)
        if param_name not in axes:
            raise ValueError(f"{param_name!r} is no axis of this space. Axes: {', '.join(axes)}.")
        return label(axes[param_name].sample(self.generator(trial.number, param_name)))
