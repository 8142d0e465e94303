"""Search, then measure the winners again on samples that the search never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ports import Proposal, Search, SearchContext
from orchestrator.registries import searches
from tasks.registry import unknown

# Searches use low indices; held-out samples start here, so the two never meet.
HELD_OUT = 2**30


@searches.register("confirm")
@dataclass(frozen=True)
class Confirm:
    """Run a search, then measure the best trial of every group again on held-out samples.

    The value by which a winner was picked is too good, the more so the more trials there were. The held-out value is
    not, and all winners are measured on the same held-out indices, so that they compare pairwise.

    Args:
        inner: spec of the search.
        objective: name of the value that decides.
        by: paths whose overridden values make the groups (``solver.name`` reads a whole spec too); empty makes one.
        num_samples: held-out samples.
        first_index: where they start.
        also: further proposals (mappings of overrides) to measure on the held-out samples.
        part: name of the held-out part; the inner search's name with "/held_out" when empty.

    Reference: Cawley and Talbot 2010, "On Over-fitting in Model Selection".
    """

    inner: dict[str, Any] = field(default_factory=dict)
    objective: str = "quality/frechet"
    by: tuple[str, ...] = ()
    num_samples: int = 2048
    first_index: int = HELD_OUT
    also: tuple[dict[str, Any], ...] = ()
    part: str = ""

    def __post_init__(self) -> None:
        searches.build(self.inner)
        if self.num_samples < 1:
            raise ValueError(f"search.num_samples must be at least 1, got {self.num_samples}.")

    def start(self, context: SearchContext) -> _Running:
        """The inner search first."""
        if self.objective not in context.better:
            raise unknown("objective", self.objective, sorted(context.better), "This study's metrics produce")
        inner = searches.build(self.inner)
        part = self.part or f"{getattr(inner, 'part', '')}/held_out".lstrip("/")
        return _Running(self, inner.start(context), context.better[self.objective] == "lower", part)


class _Running:
    def __init__(self, spec: Confirm, inner: Search, minimize: bool, part: str) -> None:
        self._spec, self._inner, self._minimize, self._part = spec, inner, minimize, part
        self._best: dict[str, tuple[tuple[float, str], Mapping[str, Any]]] = {}
        self._flying = 0
        self._held_out: list[Proposal] | None = None

    def ask(self) -> Proposal | None:
        """From the inner search; when that is over, the winners."""
        if self._held_out is None:
            found = self._inner.ask()
            if found is not None:
                self._flying += 1
                return Proposal(found.overrides, found.part, found)
            if self._flying:
                return None
            winners = [overrides for _, overrides in self._best.values()] + list(self._spec.also)
            self._held_out = [self._confirmation(overrides) for overrides in winners]
        return self._held_out.pop(0) if self._held_out else None

    def _confirmation(self, overrides: Mapping[str, Any]) -> Proposal:
        extra = {"num_samples": self._spec.num_samples, "first_index": self._spec.first_index}
        return Proposal(dict(overrides) | extra, self._part)

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """To the inner search; remember the best of each group."""
        if proposal.handle is None:
            return
        self._flying -= 1
        self._inner.tell(proposal.handle, values)
        if values is None:
            return
        value = values[self._spec.objective] * (1 if self._minimize else -1)
        group = _group(proposal.overrides, self._spec.by)
        # Equal values: the choice must not depend on which worker was quicker.
        rank = (value, json.dumps(dict(proposal.overrides), sort_keys=True))
        if group not in self._best or rank < self._best[group][0]:
            self._best[group] = (rank, proposal.overrides)

    def preview(self) -> Iterator[Proposal]:
        """The inner search's trials, and one of each group on the held-out samples."""
        groups: dict[str, Mapping[str, Any]] = {}
        for proposal in self._inner.preview():
            groups.setdefault(_group(proposal.overrides, self._spec.by), proposal.overrides)
            yield proposal
        for overrides in [*groups.values(), *self._spec.also]:
            yield self._confirmation(overrides)


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
