"""A learned model of quality: which of many points to spend evaluations on.

The target is the logarithm of the loss, cut off at twice the median, so that a schedule that blew up costs nothing and
the differences that count are kept. Four models answer together: forests of extremely randomised trees (sure in
ranking, flat next to what they know) and Gaussian processes (which say how a small change goes on), of each one that
sees what a schedule does on the probes, and one that sees the parameters too.

Reference: Geurts et al. 2006, "Extremely randomized trees"; Jones et al. 1998, "Efficient Global Optimization of
Expensive Black-Box Functions" (expected improvement). The search of Liu et al. 2024 leaves its predictor open.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.adapters.optuna_samplers.history import Point
from orchestrator.adapters.optuna_samplers.points import overrides_of
from orchestrator.adapters.optuna_samplers.probes import Probes
from orchestrator.space import Space
from tasks.recipe import canonical

TREES = 32
CUT = 2.0  # times the median: losses above it are all equally bad


class Features:
    """Points as two vectors: the parameters, and what the schedule does on the probes (empty without a schedule)."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._probes = None if space.schedule is None else Probes(space.schedule)
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Both for all points, (n, D) and (n, P)."""
        rows = [self._row(params) for params in points]
        return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])

    def _row(self, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        key = canonical(dict(params))
        if key not in self._kept:
            probes = [] if self._probes is None else self._probes(overrides_of(self._space, params)["schedule"])
            self._kept[key] = (self._space.features(params), np.array(probes))
        return self._kept[key]


class Predictor:
    """Models fitted to finished points.

    Args:
        features: of points.
        points: what was found; only what was run exactly there teaches anything.
        seed: of the trees.
    """

    def __init__(self, features: Features, points: Sequence[Point], seed: int) -> None:
        exact = [point for point in points if point.is_exact]
        self._features = features
        self._views = _views(*features([point.params for point in exact]))
        target = _target(np.array([point.loss for point in exact]))
        weights = np.array([point.samples for point in exact], dtype=np.float64)
        self._models = [(_forest(view, target, weights, seed), _process(view, target)) for view in self._views]
        self._best = float(self._moments(self._views)[0].min())

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The expected target of each point, (n,); lower is better."""
        return self._moments(_views(*self._features(points)))[0]

    def improvement(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """By how much each is expected to be better than the best known, (n,): ``s (z Phi(z) + phi(z))``."""
        from scipy.stats import norm

        mean, spread = self._moments(_views(*self._features(points)))
        z = (self._best - mean) / spread
        return spread * (z * norm.cdf(z) + norm.pdf(z))

    def _moments(self, views: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, each averaged over the models."""
        found = [model(view) for pair, view in zip(self._models, views, strict=True) for model in pair]
        return np.mean([mean for mean, _ in found], axis=0), np.mean([spread for _, spread in found], axis=0)


def _views(params: np.ndarray, probes: np.ndarray) -> list[np.ndarray]:
    """What the models see: the probes, and everything."""
    return [params] if probes.shape[1] == 0 else [probes, np.concatenate([params, probes], axis=1)]


def _target(losses: np.ndarray) -> np.ndarray:
    """Log of the losses, cut off, with mean 0 and variance 1; ranks where a loss is not positive."""
    if (losses <= 0).any():
        values = np.argsort(np.argsort(losses, kind="stable"), kind="stable").astype(np.float64)
    else:
        values = np.log(np.minimum(losses, CUT * np.median(losses)))
    return (values - values.mean()) / (values.std() or 1.0)


def _forest(columns: np.ndarray, target: np.ndarray, weights: np.ndarray, seed: int) -> _Forest:
    from sklearn.ensemble import ExtraTreesRegressor

    forest = ExtraTreesRegressor(TREES, max_features=0.5, random_state=seed)
    return _Forest(forest.fit(columns, target, weights / weights.max()))


def _process(columns: np.ndarray, target: np.ndarray) -> _Process:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    centre, scale = columns.mean(axis=0), columns.std(axis=0)
    varies = scale > 1e-9
    if not varies.any():  # points that the probes cannot tell apart
        varies, scale = np.full_like(varies, True), np.ones_like(scale)
    width = max(float(varies.sum()), 1.0) ** 0.5  # the typical distance of two points, over sqrt 2
    smooth = ConstantKernel(1.0, (0.1, 100.0)) * Matern(2 * width, (width / 10, width * 30), nu=2.5)
    model = GaussianProcessRegressor(smooth + WhiteKernel(0.1, (1e-3, 1.0)), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an end of an interval is a fine answer
        model.fit((columns[:, varies] - centre[varies]) / scale[varies], target)
    return _Process(model, centre, scale, varies)


@dataclass(frozen=True)
class _Forest:
    model: Any

    def __call__(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        every = np.array([tree.predict(columns) for tree in self.model.estimators_])
        return every.mean(axis=0), every.std(axis=0)


@dataclass(frozen=True)
class _Process:
    model: Any
    centre: np.ndarray
    scale: np.ndarray
    varies: np.ndarray

    def __call__(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The noise of a value is taken out of the spread: what counts is a point, not how it is measured."""
        scaled = (columns[:, self.varies] - self.centre[self.varies]) / self.scale[self.varies]
        mean, spread = self.model.predict(scaled, return_std=True)
        return mean, np.sqrt(np.maximum(spread**2 - self.model.kernel_.k2.noise_level, 1e-6))
