"""Axes of a search space as Optuna's distributions."""

from __future__ import annotations

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from orchestrator.space import Axis, label


def distribution(axis: Axis) -> BaseDistribution:
    """The distribution that Optuna stores for an axis: choices by their labels, whole numbers as such."""
    if axis.choices is not None:
        return CategoricalDistribution([label(choice) for choice in axis.choices])
    if axis.is_whole:
        step = 1 if axis.step is None else round(axis.step)
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=step)
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log, step=axis.step)
