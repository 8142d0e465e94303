"""Least squares: probes around a point, then the step that Levenberg and Marquardt take."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.history import History
from orchestrator.adapters.optuna_samplers.point_sampler import PointSampler
from orchestrator.adapters.optuna_samplers.points import axes_of, key_of
from orchestrator.space import Space, same

Params = Mapping[str, Any]
Search = Generator[dict[str, Any], float, None]
# (a point that was run, first row, one past the last) -> how far each row is off, (rows, elements).
Deviations = Callable[[Params, int, int], np.ndarray]

HELD = 2**24  # numbers of all probes that are held at a time: 128 MiB
ATTEMPTS = 5  # at a step that is better, each more damped than the one before
LEAST = 1e-3  # an improvement by a smaller share of the loss ends a descent
SMALLEST = 1e-4  # of the damping

# What the probes around a point say, as (matrix, vector) of its normal equations: read from the rows once a process.
_solved: WeakKeyDictionary[Space, dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LeastSquaresSampler(PointSampler):
    """Levenberg-Marquardt on what every element of every sample is off, with finite differences as its derivatives.

    A mean square error is a sum over samples and elements, thousands of numbers of which a search for the least value
    sees one. Here all of them are read from the rows of the trials: around the best point every axis is moved once (a
    trial each), which gives the derivative of every deviation, and the damped normal equations

        (J J^T + damping diag(J J^T)) step = -J r

    say where to go. Where that is better the damping falls threefold, the derivatives are carried along by Broyden's
    update, and the next step follows. Where it is not, axes are probed anew; a step from fresh probes that is worse is
    tried again, shorter, with a fourfold damping. The first descent begins at the best of ``tries`` points next to the
    best baselines; when it ends, the next one begins at the second best. Choices stay those of the start.

    The search is run again from its beginning for every trial, with the finished trials as its answers, up to the first
    point that has none: it needs no memory but the rows. A probe that failed, or is still running, leaves its axis as
    it is in the step that follows.

    Args:
        space: what may be chosen.
        seed: of the whole search, the same for every trial.
        deviations: reads the rows of a point.
        rows: how many rows a trial has.
        tries: starts that are compared.
        probe: how far an axis is moved to find a derivative, as a fraction of it.
        reach: how far one step may move an axis, as a fraction of it.
        damping: the first damping.

    Reference: Marquardt 1963, "An Algorithm for Least-Squares Estimation of Nonlinear Parameters"; Broyden 1965, "A
        Class of Methods for Solving Nonlinear Simultaneous Equations". Tong et al. 2024, "Learning to Discretize
        Denoising Diffusion ODEs" (LD3), fit times to the same target by gradient descent.
    Cost: as many trials as there are axes for the derivatives, and one for each of the one to five steps after them.
    """

    deviations: Deviations = field(repr=False, kw_only=True)
    rows: int = field(kw_only=True)
    tries: int = 8
    probe: float = 0.003
    reach: float = 0.25
    damping: float = 0.01

    def propose(self, found: History) -> dict[str, Any]:
        """The next point."""
        search = self._search(self._starts(found))
        try:
            wanted = next(search)
            while (key := key_of(self.space, wanted)) in found.losses:
                wanted = search.send(found.losses[key])
            return wanted
        except StopIteration:
            generator = self.generator("point", found.position)
            return self.new(found, lambda: self.space.sample(generator))

    def _starts(self, found: History) -> list[dict[str, Any]]:
        """Points next to the best baselines, and the middle of the space, each once."""
        known = history.best(tuple(point for point in found.finished if point.is_baseline), len(found.finished))
        points = {key_of(self.space, p.params): dict(p.params) for p in reversed(known)}
        best = list(reversed(points.values()))[: self.tries]
        return [*best, self.space.completed(self.space.middle(), self.generator("start"))][: self.tries]

    def _search(self, starts: Sequence[dict[str, Any]]) -> Search:
        """The search itself: yields points, is sent their losses."""
        losses = []
        for start in starts:
            losses.append((yield start))
        for i in np.argsort(losses, kind="stable"):
            yield from self._descent(starts[i], losses[i])

    def _descent(self, point: dict[str, Any], loss: float) -> Search:
        damping = self.damping
        while np.isfinite(loss):
            probes = {}
            for name in point:
                moved = self._moved(point, {name: self.probe})
                if moved == point:
                    moved = self._moved(point, {name: -self.probe})
                if moved != point and np.isfinite((yield moved)):
                    probes[name] = moved
            path, first = [point], loss
            while True:
                before = loss
                for _ in range(ATTEMPTS):
                    further = self._moved(point, self._step(path, probes, damping))
                    if further == point:
                        return
                    found = yield further
                    if found < loss:
                        point, loss, damping = further, found, max(damping / 3, SMALLEST)
                        path.append(point)
                        break
                    if len(path) > 1:  # derivatives that were carried along, not probed
                        break
                    damping *= 4
                if not loss < before * (1 - LEAST):
                    break
            if not loss < first * (1 - LEAST):
                return

    def _moved(self, point: Params, changes: Mapping[str, float]) -> dict[str, Any]:
        """The point with some numbers moved by fractions of their axes."""
        axes, moved = axes_of(self.space), dict(point)
        for name, change in changes.items():
            if axes[name].choices is None:
                value = axes[name].at(min(max(axes[name].unit(point[name]) + change, 0.0), 1.0))
                moved[name] = point[name] if same(value, point[name]) else value
        return self.space.completed(moved, self.generator("completed"))

    def _step(self, path: Sequence[Params], probes: Mapping[str, Params], damping: float) -> dict[str, float]:
        """How far to move every axis that was probed."""
        if not probes:
            return {}
        try:
            matrix, vector = self._equations(path, probes)
        except KeyError:  # rows in quarantine: without them nothing can be compared, so this descent ends
            return {}
        diagonal = np.diag(np.maximum(np.diag(matrix), 1e-12 * matrix.trace()))
        step = np.linalg.lstsq(matrix + damping * diagonal, -vector, rcond=None)[0]
        return dict(zip(probes, np.clip(step, -self.reach, self.reach).tolist(), strict=True))

    def _equations(self, path: Sequence[Params], probes: Mapping[str, Params]) -> tuple[np.ndarray, np.ndarray]:
        """J J^T and J r, where row k of J has the derivatives in axis k of all deviations r; float64."""
        kept = _solved.setdefault(self.space, {})
        key = tuple(key_of(self.space, params) for params in (*path, *probes.values()))
        if key not in kept:
            change = [self._units(moved, [name])[0] - self._units(path[0], [name])[0] for name, moved in probes.items()]
            places = [self._units(point, list(probes)) for point in path]
            matrix, vector = np.zeros((len(probes), len(probes))), np.zeros(len(probes))
            count = max(HELD // (len(probes) * self._off(path[0], 0, 1).size), 1)
            for start in range(0, self.rows, count):
                stop = min(start + count, self.rows)
                here = self._off(path[0], start, stop)
                slopes = np.stack([self._off(moved, start, stop) - here for moved in probes.values()])
                slopes /= np.array(change)[:, None]
                for i, point in enumerate(path[1:]):
                    there, step = self._off(point, start, stop), places[i + 1] - places[i]
                    slopes += np.outer(step, there - here - step @ slopes) / (step @ step)  # Broyden's update
                    here = there
                matrix += slopes @ slopes.T
                vector += slopes @ here
            kept[key] = matrix, vector
        return kept[key]

    def _units(self, point: Params, names: Sequence[str]) -> np.ndarray:
        return np.array([axes_of(self.space)[name].unit(point[name]) for name in names])

    def _off(self, point: Params, start: int, stop: int) -> np.ndarray:
        return self.deviations(point, start, stop).astype(np.float64).ravel()
