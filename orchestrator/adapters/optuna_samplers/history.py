"""What a study has found so far, as points of a space."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from orchestrator.adapters.optuna_samplers.points import key_of, placed
from orchestrator.adapters.optuna_search.study import BASELINE, POINT, SAMPLES
from orchestrator.space import Space
from tasks.recipe import canonical

_placed: WeakKeyDictionary[Space, dict[str, dict[str, Any] | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Attributes:
        params: its parameters by axis name, choices as they are in the space.
        loss: its value, turned so that lower is better.
        position: how many trials with a place in the space came before it.
        samples: on how many samples the value rests.
        is_exact: whether it was run at these parameters; a baseline's may be those of the nearest point.
        is_baseline: whether it was given instead of proposed.
    """

    params: Mapping[str, Any]
    loss: float
    position: int
    samples: int = 1
    is_exact: bool = True
    is_baseline: bool = False


@dataclass(frozen=True)
class History:
    """All that a proposal may depend on.

    Attributes:
        finished: finished trials that have a place in the space, oldest first.
        losses: key -> loss of those that were run exactly there; infinite for failed trials and for running ones.
        position: how many trials with a place in the space (or none yet) were asked before this one.
    """

    finished: tuple[Point, ...]
    losses: Mapping[str, float]
    position: int

    def before(self, position: int) -> tuple[Point, ...]:
        """The finished trials of earlier positions."""
        return tuple(point for point in self.finished if point.position < position)

    def knows(self, key: str) -> bool:
        """Whether a point was run, is running or has failed: it must not be proposed again."""
        return key in self.losses


def best(points: tuple[Point, ...], count: int) -> list[Point]:
    """The points of lowest loss; older ones first among equals."""
    return sorted(points, key=lambda point: (point.loss, point.position))[:count]


def read(study: Study, trial: FrozenTrial, space: Space) -> History:
    """The history of a study as a trial that is being asked for sees it.

    Failed trials never count as values, and nothing that was tried is tried again. Baselines that are no points of the
    space take no position; where they name the point next to them, it can be a parent.
    """
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    finished: list[Point] = []
    losses: dict[str, float] = {}
    position = 0
    for other in sorted(study.get_trials(deepcopy=False), key=lambda t: t.number):
        if other.number == trial.number or other.state == TrialState.WAITING:
            continue
        params, is_exact = _kept(space, other.params), True
        if params is None and POINT in other.user_attrs:
            near = other.user_attrs[POINT]
            params, is_exact = _kept(space, json.loads(near) if isinstance(near, str) else near), False
        is_done = other.state == TrialState.COMPLETE and other.value is not None and math.isfinite(other.value)
        if params is not None and is_done:
            assert other.value is not None
            samples = int(other.user_attrs.get(SAMPLES, 1))
            given = BASELINE in other.user_attrs
            finished.append(Point(params, sign * other.value, position, samples, is_exact, given))
        if params is not None and is_exact:
            key = key_of(space, params)
            losses[key] = min(losses.get(key, math.inf), finished[-1].loss if is_done else math.inf)
        is_elsewhere = BASELINE in other.user_attrs and (params is None or not is_exact)
        if other.number < trial.number and not is_elsewhere:
            position += 1
    return History(tuple(finished), losses, position)


def _kept(space: Space, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """``placed``, worked out once for every trial of a study."""
    kept = _placed.setdefault(space, {})
    name = canonical(dict(params))
    if name not in kept:
        kept[name] = placed(space, params)
    return kept[name]
