"""Bayesian optimisation in a trust region around the best point."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.history import History, Point
from orchestrator.adapters.optuna_samplers.point_sampler import PointSampler
from orchestrator.adapters.optuna_samplers.points import axes_of, key_of

SEPARATE = 32  # up to so many features each has a length scale of its own
LEAST = 1e-3  # an improvement by a smaller share of the loss is none, or the region would never shrink
MOVED = 20  # numbers that a candidate changes, on average


@dataclass(frozen=True, eq=False)
class TurboSampler(PointSampler):
    """Thompson sampling from a Gaussian process that is fitted to the points around the best one.

    All trials share their samples, so a loss is a smooth function of times and weights, and a local model of it learns
    more from a trial than a population does. The region is a box around the best point, wide along axes that matter
    little. It doubles after ``successes`` improvements in a row and halves after as many trials without one as there
    are axes; when it has become tiny it opens again. Until the region holds a few points, they are drawn in it.

    Choices stay mostly those of the best point: a candidate switches one of them now and then.

    Args:
        space: what may be chosen.
        seed: of the whole search, the same for every trial.
        start: parameters of the first centre, used until something is finished.
        length: first side of the region, as a fraction of each axis.
        min_length: smallest side.
        candidates: points that the process is asked about.
        near: points that it is fitted to, those nearest to the best.
        successes: improvements in a row after which the region grows.

    Reference: Eriksson et al. 2019, "Scalable Global Optimization via Local Bayesian Optimization" (TuRBO-1). Theirs
        begins anew elsewhere when the region is tiny; ours goes on from the best point.
    Cost: one fit and one joint draw a trial, 0.1 to 0.5 s.
    """

    start: dict[str, Any] | None = None
    length: float = 0.2
    min_length: float = 0.01
    candidates: int = 800
    near: int = 200
    successes: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.min_length <= self.length <= 1:
            raise ValueError(
                f"lengths of TuRBO must lie in 0 < min_length <= length <= 1, got {self.min_length} and {self.length}."
            )
        for name in ("candidates", "near", "successes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of TuRBO must be at least 1, got {getattr(self, name)}.")

    def propose(self, found: History) -> dict[str, Any]:
        """The next point."""
        generator = self.generator("point", found.position)
        centre = self._centre(found)
        if not found.knows(key_of(self.space, centre)):
            return centre
        side = self.side(found)
        known = self._known(found, centre, side)
        axes = axes_of(self.space)
        numbers = [name for name in centre if axes[name].choices is None]
        if len(known) <= len(numbers) + 1:
            widths = dict.fromkeys(axes, side)
            return self.new(found, lambda: self._moved(centre, widths, 1.0, generator))
        return self._sampled(found, known, centre, side, generator)

    def _centre(self, found: History) -> dict[str, Any]:
        """The best point; before anything is finished the start, or the middle of the space."""
        best = history.best(found.finished, 1)
        if best:
            return dict(best[0].params)
        given = self.start or self.space.middle()
        return self.space.completed(given, self.generator("start"))

    def side(self, found: History) -> float:
        """Side of the region: what the trials in order made of it."""
        own = sorted((p for p in found.finished if not p.is_baseline), key=lambda point: point.position)
        given = [p.loss for p in found.finished if p.is_baseline]
        count = len(axes_of(self.space))
        side, better, worse = self.length, 0, 0
        crown = min(given, default=math.inf)
        for i, point in enumerate(own):
            if point.loss < crown - LEAST * abs(crown) or math.isinf(crown):
                better, worse = better + 1, 0
            elif i > count:  # the first trials only fill the region
                better, worse = 0, worse + 1
            crown = min(crown, point.loss)
            if better == self.successes:
                side, better = min(2 * side, 1.0), 0
            if worse >= max(count, 4):
                side, worse = side / 2, 0
            if side < self.min_length:
                side = self.length
        return side

    def _rows(self, points: Sequence[Any]) -> np.ndarray:
        return np.array([self._features(params) for params in points])

    def _features(self, params: Any) -> np.ndarray:
        return np.array([value for axis in self.space.axes for value in axis.features(params.get(axis.name))])

    def _known(self, found: History, centre: dict[str, Any], side: float) -> list[Point]:
        """The exact points of the region and around it, nearest first."""
        here = self._features(centre)
        far = [
            (float(np.abs(self._features(p.params) - here).max()), p.position, p) for p in found.finished if p.is_exact
        ]
        far.sort(key=lambda entry: entry[:2])
        least = 2 * len(axes_of(self.space))  # a small region alone would know too little
        return [p for i, (distance, _, p) in enumerate(far[: self.near]) if distance <= 2 * side or i < least]

    def _moved(
        self, centre: dict[str, Any], widths: dict[str, float], scale: float, generator: np.random.Generator
    ) -> dict[str, Any]:
        """A candidate: some numbers of the centre moved, seldom a choice switched."""
        axes = axes_of(self.space)
        names = list(centre)
        chosen = generator.random(len(names)) < min(1.0, MOVED / len(names))
        chosen[generator.integers(len(names))] = True
        moved = dict(centre)
        for name, is_chosen in zip(names, chosen, strict=True):
            axis = axes[name]
            if axis.choices is not None:
                if generator.random() < 1 / len(names):
                    moved[name] = axis.sample(generator)
            elif is_chosen:
                unit = axis.unit(centre[name]) + (generator.random() - 0.5) * widths[name] * scale
                moved[name] = axis.at(min(max(unit, 0.0), 1.0))
        return self.space.completed(moved, generator)

    def _sampled(
        self,
        found: History,
        known: Sequence[Point],
        centre: dict[str, Any],
        side: float,
        generator: np.random.Generator,
    ) -> dict[str, Any]:
        """The best candidate under one draw from the process."""
        rows = self._rows([point.params for point in known])
        process, used = _fitted(rows, squashed(np.array([p.loss for p in known])))
        widths = self._widths(process, used, side)
        scales = (1.0, 0.25)  # half of the candidates are close by
        points = [self._moved(centre, widths, scales[i % 2], generator) for i in range(self.candidates)]
        mean, covariance = process.predict(self._rows(points)[:, used], return_cov=True)
        drawn = mean + _root(covariance) @ generator.standard_normal(len(points))
        ordered = iter([points[i] for i in np.argsort(drawn, kind="stable")])
        last = points[int(np.argmin(drawn))]
        return self.new(found, lambda: next(ordered, last))

    def _widths(self, process: Any, used: np.ndarray, side: float) -> dict[str, float]:
        """Sides of the region by axis: longer where the process varies slowly."""
        scales = np.broadcast_to(process.kernel_.k1.k2.length_scale, used.shape)
        relative = np.clip(scales / np.exp(np.log(scales).mean()), 0.25, 4.0)
        by_column = dict(zip(used.tolist(), relative.tolist(), strict=True))
        widths, column = {}, 0
        for axis in self.space.axes:
            size = 2 if axis.choices is None else len(axis.choices)
            widths[axis.name] = min(side * by_column.get(column + size - 1, 1.0), 1.0)
            column += size
        return widths


def squashed(losses: np.ndarray) -> np.ndarray:
    """Losses on a scale where one schedule that blew up does not hide the differences of the good ones."""
    gaps = losses - losses.min()
    scale = float(np.quantile(gaps[gaps > 0], 0.25)) if (gaps > 0).any() else 1.0
    return np.log1p(gaps / scale)


def _fitted(rows: np.ndarray, losses: np.ndarray) -> tuple[Any, np.ndarray]:
    """The process, and the columns of the features that differ at all."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    used = np.flatnonzero(rows.std(axis=0) > 0)
    if not len(used):
        used = np.array([0])
    scales = np.full(len(used), 0.5) if len(used) <= SEPARATE else 0.5
    kernel = ConstantKernel(1.0, (0.05, 50)) * Matern(scales, (0.03, 20), nu=2.5) + WhiteKernel(1e-3, (1e-6, 0.3))
    process = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length scale at its bound: the axis does not matter
        process.fit(rows[:, used], (losses - losses.mean()) / (losses.std() + 1e-12))
    return process, used


def _root(covariance: np.ndarray) -> np.ndarray:
    """Cholesky factor of a covariance that rounding may have spoilt."""
    jitter = 1e-8 * float(np.trace(covariance)) / len(covariance) + 1e-12
    while True:
        try:
            return np.linalg.cholesky(covariance + jitter * np.eye(len(covariance)))
        except np.linalg.LinAlgError:
            jitter *= 100
