"""Axes as Optuna's distributions, and what samplers with a fixed search space are shown."""

from __future__ import annotations

import warnings
from typing import Any

from orchestrator.space import Axis, Space, label


def distribution(axis: Axis) -> Any:
    """The distribution that a trial's suggestion for this axis has."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a high that is no multiple of the step
        if axis.choices is not None:
            return CategoricalDistribution([label(choice) for choice in axis.choices])
        if axis.is_whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
        return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def shared(space: Space) -> dict[str, Any]:
    """Distributions of the axes that every point has, those with a single value left out."""
    present = space.shared
    found = {axis.name: distribution(axis) for axis in space.axes if axis.name in present}
    return {name: d for name, d in found.items() if not d.single()}


def with_space(sampler: Any, fixed: dict[str, Any]) -> Any:
    """The sampler over a fixed space.

    Optuna would take the intersection of all trials, and baselines that are no points of the space have no parameters.
    """
    sampler.infer_relative_search_space = lambda study, trial: fixed
    return sampler


class Covering:
    """A study as a sampler sees it that cannot do with trials which lack some of its parameters."""

    def __init__(self, study: Any, fixed: dict[str, Any]) -> None:
        self._study, self._names = study, set(fixed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Those that have them all."""
        return [t for t in self._study.get_trials(*args, **kwargs) if self._names <= set(t.params)]

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [t for t in self._study._get_trials(*args, **kwargs) if self._names <= set(t.params)]
