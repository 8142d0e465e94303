"""Points of a space: complete parameters, and what they run.

Samplers look at the same points again and again, once a trial and for every one before it; what a point decodes to is
kept as long as its space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from orchestrator.space import Axis, Space
from tasks.recipe import canonical, digest

Params = Mapping[str, Any]

_axes: WeakKeyDictionary[Space, dict[str, Axis]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[Space, dict[str, tuple[str, dict[str, Any]]]] = WeakKeyDictionary()
KEPT = 20_000  # points of a space


def axes_of(space: Space) -> Mapping[str, Axis]:
    """All axes of a space by name."""
    if space not in _axes:
        _axes[space] = {axis.name: axis for axis in space.axes}
    return _axes[space]


def overrides_of(space: Space, params: Params) -> Mapping[str, Any]:
    """What a point runs."""
    return _run(space, params)[1]


def key_of(space: Space, params: Params) -> str:
    """Names what a point runs: two points that come to the same schedule have the same key."""
    return _run(space, params)[0]


def _run(space: Space, params: Params) -> tuple[str, dict[str, Any]]:
    runs = _runs.setdefault(space, {})
    name = canonical(dict(params))
    if name not in runs:
        if len(runs) >= KEPT:
            runs.clear()
        overrides = space.decode(params)
        runs[name] = digest(overrides), overrides
    return runs[name]


def every(space: Space) -> Iterator[dict[str, Any]]:
    """All points of a space of choices and spaced values, in order; other intervals stay in their middle."""
    path: list[int] = []  # which of its values each axis of the walk takes
    while True:
        counts: list[int] = []

        def suggest(axis: Axis, counts: list[int] = counts) -> Any:
            values = _values(axis)
            counts.append(len(values))
            if len(path) < len(counts):
                path.append(0)
            return values[path[len(counts) - 1]]

        yield space.walk(suggest)[0]
        while path and path[-1] + 1 == counts[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


def _values(axis: Axis) -> Sequence[Any]:
    if axis.choices is not None:
        return axis.choices
    step = axis.step or (1 if axis.is_whole else 0)
    if not step:
        return [axis.at(0.5)]
    return [axis.nearest(axis.low + i * step) for i in range(int((axis.high - axis.low) / step + 1e-9) + 1)]


def placed(space: Space, params: Params) -> dict[str, Any] | None:
    """Stored parameters (choices as labels, perhaps too many) as a point; None where some are missing."""
    try:
        return space.walk(lambda axis: axis.nearest(params[axis.name]))[0]
    except KeyError:
        return None
