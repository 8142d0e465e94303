"""Search spaces: what a search may choose, as YAML that a user can read and edit.

A space maps dotted paths to what each may be: a list of choices, or ``{low, high}`` (with ``log: true`` or ``step``).
An axis with ``when: {path: values}`` exists only where the axis named there took one of those values. The special key
``schedule`` opens a whole solver schedule, step by step (``orchestrator/schedule_space.py``), or of a token model the
times of its steps (``orchestrator/token_space.py``).

A point is found by *walking*: the space asks for one axis after another and skips those that do not apply, so the same
walk serves a sampler that draws values, a known point that is read back, and a mutation of an older point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.schedule_space import ScheduleSpace
from orchestrator.token_space import TokenTimes
from tasks.recipe import Recipe
from tasks.registry import unknown

FIELDS = ("low", "high", "log", "step", "when", "choices")


@dataclass(frozen=True)
class Axis:
    """One thing to choose.

    Attributes:
        name: dotted path, or a name inside the schedule (``order.2``).
        low, high: ends of an interval, both included; whole numbers where both are.
        log: whether the interval is searched in the logarithm.
        step: spacing of the allowed values.
        choices: the allowed values, where it is no interval.
        when: name of another axis -> values at which this one exists.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] | None = None
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the interval holds whole numbers."""
        return self.choices is None and isinstance(self.low, int) and isinstance(self.high, int)

    def sample(self, generator: np.random.Generator) -> Any:
        """A uniform draw."""
        if self.choices is not None:
            return self.choices[int(generator.integers(len(self.choices)))]
        return self.at(float(generator.uniform()))

    def at(self, unit: float) -> Any:
        """The value at a fraction of the way from low to high."""
        assert self.choices is None
        if self.log:
            value = math.exp(math.log(self.low) + unit * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + unit * (self.high - self.low)
        return self.nearest(value)

    def unit(self, value: Any) -> float:
        """The fraction of the way, for numbers."""
        if self.high == self.low:
            return 0.5
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return float(value - self.low) / (self.high - self.low)

    def nearest(self, value: Any) -> Any:
        """The allowed value next to this one; a choice that is not there becomes the first."""
        if self.choices is not None:
            return next((choice for choice in self.choices if same(choice, value)), self.choices[0])
        value = min(max(value, self.low), self.high)
        if self.step is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
            value = value if value <= self.high + 1e-12 else value - self.step
            value = float(f"{value:.12g}")  # 0.3, not 0.1 + 0.1 + 0.1: what a storage takes for a multiple of its step
        return round(value) if self.is_whole else float(value)

    def features(self, value: Any) -> list[float]:
        """The value as numbers for a model: one-hot for choices, the fraction else; zeros where it does not apply."""
        if self.choices is not None:
            return [float(value is not None and same(choice, value)) for choice in self.choices]
        return [0.0, 0.0] if value is None else [1.0, self.unit(value)]


Suggest = Callable[[Axis], Any]


class Space:
    """What a search ranges over.

    Args:
        data: the YAML of ``search.space``.
        recipe: what the overrides are laid over; needed where the space opens a schedule.

    Raises:
        ValueError: an empty, contradictory or misspelt space.
    """

    def __init__(self, data: Mapping[str, Any], recipe: Recipe | None = None) -> None:
        check_space(data)
        self.schedule: ScheduleSpace | None = None
        self.token_times: TokenTimes | None = None
        if "schedule" in data:
            if recipe is None:
                raise ValueError("search.space.schedule needs a study's recipe: it is laid over a model's process.")
            if recipe.parts.model.noising.kind == "masked":
                _refuse_times_beside(data)
                self.token_times = TokenTimes(data["schedule"], recipe, parse_axis)
            else:
                self.schedule = ScheduleSpace(data["schedule"], recipe, parse_axis)
        plain = [parse_axis(path, axis) for path, axis in data.items() if path != "schedule"]
        self.plain = _ordered(plain)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes that some point of the space has, in the order of a walk."""
        opened = self.schedule or self.token_times
        return (*self.plain, *(opened.axes if opened else ()))

    @property
    def nfes(self) -> tuple[int, ...]:
        """The numbers of evaluations that a schedule may have; empty where the space opens none."""
        opened = self.schedule or self.token_times
        return opened.nfes if opened else ()

    def walk(self, suggest: Suggest) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask for every axis that applies; (parameters by axis name, overrides of the recipe)."""
        params: dict[str, Any] = {}

        def ask(axis: Axis) -> Any:
            params[axis.name] = suggest(axis)
            return params[axis.name]

        overrides = {}
        for axis in self.plain:
            if all(params.get(name) in values for name, values in axis.when.items() if name in params) and all(
                name in params for name in axis.when
            ):
                overrides[axis.name] = ask(axis)
        if self.schedule is not None:
            overrides["schedule"] = self.schedule.walk(ask)
        if self.token_times is not None:
            overrides |= self.token_times.walk(ask)
        return params, overrides

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides of a complete point.

        Raises:
            KeyError: a parameter is missing.
        """
        return self.walk(lambda axis: params[axis.name])[1]

    def sample(self, generator: np.random.Generator) -> dict[str, Any]:
        """The parameters of a point drawn uniformly."""
        return self.walk(lambda axis: axis.sample(generator))[0]

    def completed(self, partial: Mapping[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """The parameters of a point near given ones: what is not given is drawn, what does not apply falls away."""

        def suggest(axis: Axis) -> Any:
            return axis.nearest(partial[axis.name]) if axis.name in partial else axis.sample(generator)

        return self.walk(suggest)[0]

    def encode(self, overrides: Mapping[str, Any]) -> dict[str, Any] | None:
        """The parameters of the point nearest to some overrides; None where they leave an axis open."""
        plain = {axis.name for axis in self.plain}
        try:
            reader: Callable[[Axis], Any] | None = None
            if self.schedule is not None:
                reader = self.schedule.reader(overrides["schedule"])
            elif self.token_times is not None:
                reader = self.token_times.reader(overrides)

            def suggest(axis: Axis) -> Any:
                return axis.nearest(overrides[axis.name] if axis.name in plain else reader(axis))  # type: ignore[misc]

            return self.walk(suggest)[0]
        except KeyError:
            return None

    def features(self, params: Mapping[str, Any]) -> np.ndarray:
        """A point as a vector of fixed length, for models of quality."""
        found = [value for axis in self.axes for value in axis.features(params.get(axis.name))]
        if self.schedule is not None:
            found += self.schedule.features(params)
        if self.token_times is not None:
            found += self.token_times.features(params)
        return np.array(found)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names of the axes that every point has (of many drawn, the same ones every time)."""
        generator = np.random.default_rng(0)
        drawn = [set(self.sample(generator)) for _ in range(100)]
        return frozenset(set.intersection(*drawn))

    def middle(self) -> dict[str, Any]:
        """The parameters of the point in the middle."""
        return self.walk(lambda axis: axis.choices[0] if axis.choices is not None else axis.at(0.5))[0]


def same(a: Any, b: Any) -> bool:
    """Whether two choices are equal as data (2 and 2.0 are, 1 and True are not)."""
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return a == b or label(a) == label(b)


def label(value: Any) -> Any:
    """A choice as a plain value: numbers, words and null as they are, specs as text."""
    return json.dumps(value, sort_keys=True) if isinstance(value, Mapping | list | tuple) else value


def check_space(space: Mapping[str, Any], name: str = "") -> None:
    """A search space must name something."""
    if not isinstance(space, Mapping) or not space:
        of = f"search {name}" if name else "the search"
        raise ValueError(f"{of} has an empty space. Set search.space, for example {{solver: [ddim, heun]}}.")


def _refuse_times_beside(data: Mapping[str, Any]) -> None:
    """Axes that would set the times a second time."""
    for path in data:
        if path == "nfe" or path.partition(".")[0] == "times":
            raise ValueError(
                f"search.space has both schedule and {path}, which sets the times again. Put it into "
                "search.space.schedule, as nfe or times."
            )


def parse_axis(path: str, data: Any) -> Axis:
    """One entry of a space.

    Raises:
        ValueError: says which entry is wrong and what is allowed.
    """
    where = f"search.space.{path}"
    if isinstance(data, list | tuple):
        data = {"choices": list(data)}
    if not isinstance(data, Mapping) or not ({"low", "high"} <= set(data) or "choices" in data):
        raise ValueError(f"{where} must be a list of choices or {{low, high[, log, step]}}, got {data!r}.")
    for key in data:
        if key not in FIELDS:
            raise unknown(f"field of {where}:", key, list(FIELDS), "Fields")
    when = data.get("when") or {}
    if not isinstance(when, Mapping):
        raise ValueError(f"{where}.when must map another path to the values at which this one exists, got {when!r}.")
    conditions = {str(k): tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in when.items()}
    if "choices" in data:
        choices = data["choices"]
        if not isinstance(choices, list | tuple) or not choices:
            raise ValueError(f"{where} must have one choice or more, got {choices!r}.")
        if any(same(a, b) for i, a in enumerate(choices) for b in choices[:i]):
            raise ValueError(f"{where} names a choice twice: {choices!r}.")
        if set(data) & {"low", "high", "log", "step"}:
            raise ValueError(f"{where} has both choices and an interval, got {dict(data)!r}. Give one.")
        return Axis(path, choices=tuple(choices), when=conditions)
    low, high, step = data["low"], data["high"], data.get("step")
    for end, value in (("low", low), ("high", high), ("step", step)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not (end == "step" and value is None):
            raise ValueError(f"{where}.{end} must be a number, got {value!r}.")
    if not low <= high:
        raise ValueError(f"{where} is empty: low {low} is above high {high}.")
    if data.get("log") and (low <= 0 or step is not None):
        raise ValueError(f"{where}: log needs low above 0 and no step, got {dict(data)!r}.")
    if step is not None and step <= 0:
        raise ValueError(f"{where}.step must be above 0, got {step!r}.")
    if isinstance(low, float) or isinstance(high, float) or isinstance(step, float):
        low, high = float(low), float(high)
    return Axis(path, low, high, bool(data.get("log")), step, None, conditions)


def _ordered(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axes, each after those that its condition names.

    Raises:
        ValueError: a condition that names no axis, or that no point can meet.
    """
    named = {axis.name: axis for axis in axes}
    for axis in axes:
        for other, values in axis.when.items():
            if other not in named:
                raise unknown(f"axis in search.space.{axis.name}.when:", other, sorted(named), "Axes")
            parent = named[other]
            possible = [v for v in values if _can_be(parent, v)]
            if not possible:
                raise ValueError(
                    f"search.space.{axis.name} can never exist: {other} is never one of {list(values)}. Allowed are "
                    f"{list(parent.choices) if parent.choices is not None else [parent.low, parent.high]}."
                )
    done: list[Axis] = []
    waiting = list(axes)
    while waiting:
        ready = [axis for axis in waiting if all(any(d.name == other for d in done) for other in axis.when)]
        if not ready:
            raise ValueError(
                f"the conditions of search.space go in a circle: {', '.join(axis.name for axis in waiting)}."
            )
        done += ready
        waiting = [axis for axis in waiting if axis not in ready]
    return tuple(done)


def _can_be(axis: Axis, value: Any) -> bool:
    if axis.choices is not None:
        return any(same(choice, value) for choice in axis.choices)
    return isinstance(value, int | float) and axis.low <= value <= axis.high


def points(space: Space, generator: np.random.Generator, count: int) -> Iterator[dict[str, Any]]:
    """Parameters of points drawn uniformly: what planning looks at where a space is too large to list."""
    for _ in range(count):
        yield space.sample(generator)
