"""Coordinate refinement: one axis at a time around the best point, with steps that shrink."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_samplers import history
from orchestrator.adapters.optuna_samplers.history import History
from orchestrator.adapters.optuna_samplers.nodes import split
from orchestrator.adapters.optuna_samplers.point_sampler import PointSampler
from orchestrator.adapters.optuna_samplers.points import axes_of, key_of
from orchestrator.space import Axis, same

Params = dict[str, Any]
Search = Generator[Params, float, None]


@dataclass(frozen=True, eq=False)
class CoordinateSampler(PointSampler):
    """Pattern search around the best of the first trials.

    An axis is moved by plus and minus its step (a choice is switched to each other one); the first that is better is
    kept, and where neither is the step is halved. Later steps of a schedule come first, because trials then share the
    beginning of the trajectory. After a sweep that moved something, the whole movement is made once more, and again
    while that helps. When all steps are below ``min_step``, the next best of the first trials is refined.

    The search is run again from its beginning for every trial, with the finished trials as its answers, up to the first
    point that has none. So it needs no memory, and a trial that is still running counts as not better until it is done.

    Args:
        space: what may be chosen.
        seed: of the whole search, the same for every trial.
        startup: trials before the refinement: what the study begins with, filled up with random points.
        step: first step, as a fraction of an axis.
        min_step: smallest step.

    Reference: Hooke and Jeeves 1961, "'Direct Search' Solution of Numerical and Statistical Problems".
    """

    startup: int = 8
    step: float = 0.125
    min_step: float = 0.002

    def __post_init__(self) -> None:
        if self.startup < 1:
            raise ValueError(f"startup of a coordinate search must be at least 1, got {self.startup}.")
        if not 0 < self.min_step <= self.step <= 1:
            raise ValueError(
                f"steps of a coordinate search must lie in 0 < min_step <= step <= 1, got {self.min_step} and "
                f"{self.step}."
            )

    def propose(self, found: History) -> Params:
        """The next point."""
        generator = self.generator("point", found.position)
        if found.position >= self.startup:
            for start in history.best(found.before(self.startup), self.startup):
                unknown = self._replayed(start, found)
                if unknown is not None:
                    return unknown
        return self.new(found, lambda: self.space.sample(generator))

    def _replayed(self, start: history.Point, found: History) -> Params | None:
        """The first point of the search from here that nobody tried; None where it has ended."""
        losses = dict(found.losses)
        if start.is_exact:  # of two trials at one point the better counts, as for all others
            losses.setdefault(key_of(self.space, start.params), start.loss)
        search = self._search(dict(start.params))
        try:
            wanted = next(search)
            while (key := key_of(self.space, wanted)) in losses:
                wanted = search.send(losses[key])
        except StopIteration:
            return None
        return wanted

    def _search(self, point: Params) -> Search:
        """The search itself: yields points, is sent their losses."""
        loss = yield point
        steps: dict[str, float] = {}
        while True:
            before, is_smaller = point, False
            for name in self._order(point):
                if name not in point:  # a switched choice took it away
                    continue
                moved, moved_loss = yield from self._explored(point, name, steps.get(name, self.step), loss)
                if moved is not None:
                    point, loss = moved, moved_loss
                elif steps.get(name, self.step) >= self.min_step:
                    # Nothing about a switch shrinks: one that did not help is not tried again.
                    is_choice = axes_of(self.space)[name].choices is not None
                    steps[name] = 0.0 if is_choice else steps.get(name, self.step) / 2
                    is_smaller = True
            if point != before:
                point, loss = yield from self._extended(before, point, loss)
            elif not is_smaller:
                return

    def _order(self, point: Params) -> list[str]:
        """Later steps of the schedule first; what belongs to no step changes everything, so it comes last."""

        def place(name: str) -> float:
            step = split(name)[1]
            return math.inf if step is None else -step

        return sorted(reversed(list(point)), key=place)

    def _explored(
        self, point: Params, name: str, step: float, loss: float
    ) -> Generator[Params, float, tuple[Params | None, float]]:
        """The first better neighbour along an axis."""
        if step < self.min_step:
            return None, loss
        axis = axes_of(self.space)[name]
        if axis.choices is not None:
            values = [choice for choice in axis.choices if not same(choice, point[name])]
        else:
            values = [_moved(axis, point[name], sign * step) for sign in (1, -1)]
        for value in values:
            if same(value, point[name]):
                continue
            moved = self._completed(point | {name: value})
            moved_loss = yield moved
            if moved_loss < loss:
                return moved, moved_loss
        return None, loss

    def _extended(self, before: Params, point: Params, loss: float) -> Generator[Params, float, tuple[Params, float]]:
        """The last movement made again, on all its axes together, while that helps."""
        while True:
            axes = axes_of(self.space)
            further = dict(point)
            for name, value in point.items():
                axis = axes[name]
                if axis.choices is None and name in before:
                    unit = 2 * axis.unit(value) - axis.unit(before[name])
                    further[name] = axis.at(min(max(unit, 0.0), 1.0))
            further = self._completed(further)
            if further == point:
                return point, loss
            further_loss = yield further
            if not further_loss < loss:
                return point, loss
            before, point, loss = point, further, further_loss

    def _completed(self, params: Mapping[str, Any]) -> Params:
        """Axes that a switched choice brings along get the same value whenever they do."""
        return self.space.completed(params, self.generator("completed", _name(params)))


def _moved(axis: Axis, value: Any, change: float) -> Any:
    """The value a fraction of the axis away; where values are spaced, at least the next one."""
    found = axis.at(min(max(axis.unit(value) + change, 0.0), 1.0))
    spacing = axis.step if axis.step is not None else 1 if axis.is_whole else 0
    return axis.nearest(value + math.copysign(spacing, change)) if spacing and same(found, value) else found


def _name(params: Mapping[str, Any]) -> str:
    """A name for parameters that may not be complete."""
    return "/".join(f"{name}={params[name]!r}" for name in sorted(params))
