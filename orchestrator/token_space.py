"""The part of a search space that is a grid of times of a token sampler: how many tokens every step reveals.

    schedule:
      nfe: 8                          # or a list, to search it jointly; left out, the study's
      times: free                     # every node; or a grid whose fields are searched: {name: curve, …}

In a masked process t is the share of masks, so a step from t to s reveals about ``L (t - s)`` of L tokens. A free node
is told by its *pace*, relative to the node before and to uniform steps over what is left of N:

    t_i = t_{i-1} ((N - i) / (N - i + 1))^pace_i

So a pace of 1 everywhere is the uniform grid, 2 reveals about twice as many tokens as an equal share, and changing one
leaves all earlier steps as they were. ``times: {low, high, log}`` sets the interval of paces. The last node is 0. Every
solver of tokens takes one evaluation a step. What else may be chosen, solver, temperature and truncation
(``solver.filters``), remasking or strategy, are axes of their own beside ``schedule`` (``configs/space/tokens.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.schedule_space import evaluations
from tasks import registry
from tasks.recipe import Recipe
from tasks.registry import unknown

if TYPE_CHECKING:
    from orchestrator.space import Axis

PACE = {"low": 0.25, "high": 4.0, "log": True}
MAX_NFE = 256


class TokenTimes:
    """The axes of a grid of times and the way from a point to the grid.

    Args:
        data: the YAML below ``schedule``.
        recipe: the study's: its process, and its number of evaluations where ``nfe`` is left out.
        parse: makes an axis of one entry.

    Raises:
        ValueError: an unknown or impossible entry.
    """

    def __init__(self, data: Any, recipe: Recipe, parse: Callable[[str, Any], Axis]) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"search.space.schedule must be a mapping, for example {{times: free}}, got {data!r}.")
        for key in data:
            if key not in ("nfe", "times"):
                raise ValueError(
                    f"search.space.schedule.{key} does not exist for tokens: model {recipe.model['name']} is "
                    f"{recipe.parts.model.noising.kind}. Allowed are nfe and times; other fields are axes beside "
                    "schedule, such as solver.eta or solver.filters."
                )
        self._recipe, self._parse = recipe, parse
        self.start = recipe.parts.initial.start(recipe.parts.model.noising)
        self.nfes = evaluations(data, recipe, MAX_NFE)
        self._pace, self._spec = self._take(data.get("times", "free"))

    def _take(self, value: Any) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The interval of paces, or None and the spec of a grid whose fields may be intervals."""
        if value == "free":
            return PACE, {}
        if isinstance(value, Mapping) and "name" not in value:
            axis = self._parse("schedule.times", value)
            if axis.choices is not None or axis.low <= 0:
                raise ValueError(f"search.space.schedule.times must be paces above 0, got {dict(value)!r}.")
            return dict(value), {}
        spec = {"name": value} if isinstance(value, str) else dict(value)
        fields = registry.times.get(spec["name"]).__dataclass_fields__  # type: ignore[attr-defined]
        if "num_steps" not in fields:
            raise ValueError(f"search.space.schedule.times {spec['name']!r} has a fixed number of steps. Use free.")
        for name, item in spec.items():
            if name not in ("name", *fields):
                raise unknown(f"field of times {spec['name']}:", name, sorted(fields), "Fields")
            if isinstance(item, Mapping | list):
                self._parse(f"schedule.times.{name}", item)
        return None, spec

    def walk(self, ask: Callable[[Axis], Any]) -> dict[str, Any]:
        """The overrides of the recipe, ``{"times": spec}``, whose decisions ``ask`` makes."""
        nfe = self.nfes[0] if len(self.nfes) == 1 else ask(self._parse("nfe", list(self.nfes)))
        if self._pace is not None:
            values = [self.start]
            for i in range(1, nfe):
                values.append(values[-1] * _even(nfe, i) ** ask(self._parse(f"pace.{i}", self._pace)))
            return {"times": {"name": "explicit", "values": [*values, 0.0]}}
        spec = {"num_steps": nfe}
        for name, value in self._spec.items():
            is_axis = isinstance(value, Mapping | list)
            spec[name] = ask(self._parse(f"times.{name}", value)) if is_axis else value
        return {"times": spec}

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis that some point has."""
        found = [self._parse("nfe", list(self.nfes))] if len(self.nfes) > 1 else []
        if self._pace is not None:
            return (*found, *(self._parse(f"pace.{i}", self._pace) for i in range(1, max(self.nfes))))
        axes = {name: value for name, value in self._spec.items() if isinstance(value, Mapping | list)}
        return (*found, *(self._parse(f"times.{name}", value) for name, value in axes.items()))

    def reader(self, overrides: Mapping[str, Any]) -> Callable[[Axis], Any]:
        """What the grid of given overrides answers to each axis; KeyError for what it cannot say."""
        made = self._recipe.override({path: overrides[path] for path in ("times", "nfe") if path in overrides})
        grid, steps = made.grid[0], len(made.grid[0]) - 1
        if steps not in self.nfes:
            raise KeyError("another number of evaluations")

        def read(axis: Axis) -> Any:
            head, _, place = axis.name.partition(".")
            if head == "nfe":
                return steps
            if head == "times":
                return made.times[place] if made.times["name"] == self._spec["name"] else overrides[axis.name]
            i = int(place)
            return math.log(grid[i] / grid[i - 1]) / math.log(_even(steps, i))

        return read

    def features(self, params: Mapping[str, Any]) -> list[float]:
        """The nodes of a point, and zeros up to the longest grid: what the paces mean together."""
        spec = self.walk(lambda axis: params[axis.name])["times"]
        grid = registry.times.build(spec)(self._recipe.parts.model.noising, self.start)
        return [*grid[1:], *[0.0] * (max(self.nfes) + 1 - len(grid))]


def _even(num_steps: int, i: int) -> float:
    """The share of masks that an even step leaves, of those that step i - 1 of N left."""
    return (num_steps - i) / (num_steps - i + 1)
