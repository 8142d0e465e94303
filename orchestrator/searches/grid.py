"""Every combination of listed values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches
from orchestrator.searches.single import Listed
from orchestrator.space import check_space


@searches.register("grid")
@dataclass(frozen=True)
class Grid:
    """Every combination of the listed values, the last axis fastest.

    An axis is a dotted path with its values, or a name of your own whose values are mappings of several paths that
    change together.

    Args:
        space: axis -> list of values (plug-in names or whole specs for ``solver``, ``times``, …).
        set: overrides that every trial shares.
        part: name of this part of the study.

    Reference: none needed.
    """

    space: dict[str, Any] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    part: str = ""

    def __post_init__(self) -> None:
        check_space(self.space, "grid")
        for path, values in self.space.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"search.space.{path} must be a list of one or more values, got {values!r}.")

    def start(self, context: SearchContext) -> Listed:
        """All combinations."""
        proposals = []
        for combination in itertools.product(*self.space.values()):
            overrides = dict(self.set)
            for path, value in zip(self.space, combination, strict=True):
                together = isinstance(value, dict) and "name" not in value
                overrides |= value if together else {path: value}
            proposals.append(Proposal(overrides, self.part))
        return Listed(proposals)
