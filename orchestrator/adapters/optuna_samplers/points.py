"""Points of a space: complete parameters, and what they run.

Samplers look at the same points again and again, once a trial and for every one before it; what a point decodes to is
kept as long as its space.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def placed(space: Space, params: Params) -> dict[str, Any] | None:
    """Stored parameters (choices as labels, perhaps too many) as a point; None where some are missing."""
    try:
        return space.walk(lambda axis: axis.nearest(params[axis.name]))[0]
    except KeyError:
        return None
