"""Search, then measure the winners again on samples that the search never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.ports import Proposal, Search, SearchContext
from orchestrator.registries import searches
from tasks.registry import unknown

# Searches use low indices; held-out samples start here, so the two never meet.
HELD_OUT = 2**30


@searches.register("confirm")
@dataclass(frozen=True)
class Confirm:
    """Run a search, then measure the best trial of every group again on held-out samples, and the best baseline too.

    The value by which a winner was picked is too good, the more so the more trials there were. The held-out value is
    not, and all winners are measured on the same held-out indices, so that they compare pairwise. With several
    objectives the winners are the Pareto front.

    Args:
        inner: spec of the search.
        objective: name of the value that decides.
        objectives: several values instead: every trial that no other beats in all of them is a winner.
        by: paths whose overridden values make the groups (``solver.name`` reads a whole spec too); empty makes one.
        num_samples: held-out samples.
        first_index: where they start.
        most: of a front, at most so many winners (spread over the first objective).
        also: further proposals (mappings of overrides) to measure on the held-out samples.
        part: name of the held-out part; the inner search's name with "/held_out" when empty.

    Reference: Cawley and Talbot 2010, "On Over-fitting in Model Selection".
    """

    inner: dict[str, Any] = field(default_factory=dict)
    objective: str = "quality/frechet"
    objectives: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    num_samples: int = 2048
    first_index: int = HELD_OUT
    most: int = 12
    also: tuple[dict[str, Any], ...] = ()
    part: str = ""

    def __post_init__(self) -> None:
        searches.build(self.inner)
        for name in ("num_samples", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be at least 1, got {getattr(self, name)}.")
        if len(self.objectives) == 1:
            raise ValueError(f"search.objectives must name two values or more, got {list(self.objectives)}.")

    def targets(self) -> tuple[str, ...]:
        """The values that decide."""
        return self.objectives or (self.objective,)

    def start(self, context: SearchContext) -> _Running:
        """The inner search first."""
        for objective in self.targets():
            if objective not in context.better:
                raise unknown("objective", objective, sorted(context.better), "This study's metrics produce")
        inner = searches.build(
            self.inner | ({"held_out": 0} if "held_out" in searches.defaults(self.inner["name"]) else {})
        )
        part = self.part or f"{getattr(inner, 'part', '')}/held_out".lstrip("/")
        return _Running(self, inner.start(context), context, part)


@dataclass(frozen=True)
class _Seen:
    """A finished trial of the inner search: its values with less being better, and a rank among equals."""

    values: tuple[float, ...]
    overrides: Mapping[str, Any]
    baseline: str

    @property
    def rank(self) -> tuple[Any, ...]:
        # Equal values: the choice must not depend on which worker was quicker.
        return (*self.values, json.dumps(dict(self.overrides), sort_keys=True))


class _Running:
    def __init__(self, spec: Confirm, inner: Search, context: SearchContext, part: str) -> None:
        self._spec, self._inner, self._context, self._part = spec, inner, context, part
        self._signs = [1 if context.better[name] == "lower" else -1 for name in spec.targets()]
        self._seen: dict[str, list[_Seen]] = {}
        self._flying = 0
        self._held_out: list[Proposal] | None = None

    def ask(self) -> Proposal | None:
        """From the inner search; when that is over, the winners."""
        if self._held_out is None:
            found = self._inner.ask()
            if found is not None:
                self._flying += 1
                return replace(found, handle=found)
            if self._flying:
                return None
            self._held_out = [*self._winners(), *map(self._confirmation, self._spec.also)]
        return self._held_out.pop(0) if self._held_out else None

    def _winners(self) -> Iterator[Proposal]:
        """The front of every group, then its best baseline if that is not among them."""
        for _, seen in sorted(self._seen.items()):
            front = pareto(seen)
            if len(front) > self._spec.most:
                last = len(front) - 1
                spread = sorted({round(i * last / max(self._spec.most - 1, 1)) for i in range(self._spec.most)})
                front = [front[i] for i in spread]
            yield from (self._confirmation(one.overrides, one.baseline) for one in front)
            known = sorted((one for one in seen if one.baseline), key=lambda one: one.rank)
            if known and not any(one.baseline for one in front):
                yield self._confirmation(known[0].overrides, known[0].baseline)

    def _confirmation(self, overrides: Mapping[str, Any], baseline: str = "") -> Proposal:
        extra = {"num_samples": self._spec.num_samples, "first_index": self._spec.first_index}
        return Proposal(dict(overrides) | extra, self._part, baseline=baseline)

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """To the inner search; remember what may win."""
        if proposal.handle is None:
            return
        self._flying -= 1
        self._inner.tell(proposal.handle, values)
        if values is None:
            return
        found = tuple(sign * values[name] for sign, name in zip(self._signs, self._spec.targets(), strict=True))
        one = _Seen(found, proposal.overrides, proposal.baseline)
        self._seen.setdefault(_group(proposal.overrides, self._spec.by), []).append(one)

    def summary(self) -> list[dict[str, Any]]:
        """The inner search's, with where its winners were measured again."""
        return [entry | {"held_out": self._part} for entry in self._inner.summary()]

    def preview(self) -> Iterator[Proposal]:
        """The inner search's trials, and one of each group on the held-out samples.

        Raises:
            ValueError: the held-out samples are among those that the search sees.
        """
        groups: dict[str, Proposal] = {}
        low, high = self._spec.first_index, self._spec.first_index + self._spec.num_samples
        for proposal in self._inner.preview():
            groups.setdefault(_group(proposal.overrides, self._spec.by), proposal)
            first = proposal.overrides.get("first_index", self._context.first_index)
            count = proposal.overrides.get("num_samples", self._context.num_samples)
            if first < high and low < first + count:
                raise ValueError(
                    f"the held-out samples [{low}, {high}) overlap the search's own [{first}, {first + count}). Set "
                    f"search.first_index to {first + count} or more."
                )
            yield proposal
        for proposal in groups.values():
            yield self._confirmation(proposal.overrides)
        yield from map(self._confirmation, self._spec.also)


def pareto(seen: list[_Seen]) -> list[_Seen]:
    """Those that no other beats in every value, by the first value; of one objective the best alone."""
    front: list[_Seen] = []
    for one in sorted(seen, key=lambda one: one.rank):
        if not any(all(a <= b for a, b in zip(held.values, one.values, strict=True)) for held in front):
            front.append(one)
    return front


def _group(overrides: Mapping[str, Any], paths: tuple[str, ...]) -> str:
    return json.dumps([_look_up(overrides, path) for path in paths], sort_keys=True)


def _look_up(overrides: Mapping[str, Any], path: str) -> Any:
    """The value of a path among overrides, also inside a whole spec; a bare plug-in name is its ``name``."""
    if path in overrides:
        return overrides[path]
    head, _, rest = path.partition(".")
    value: Any = overrides.get(head)
    if isinstance(value, str):
        return value if rest == "name" else None
    for key in rest.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
