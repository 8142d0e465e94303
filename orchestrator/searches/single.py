"""One trial: the recipe as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches


@searches.register("single")
@dataclass(frozen=True)
class Single:
    """No search: one trial, the recipe itself.

    Reference: none needed.
    """

    part: str = ""

    def start(self, context: SearchContext) -> Listed:
        """The one trial."""
        return Listed([Proposal({}, self.part)])


class Listed:
    """A search over a list that is known beforehand."""

    lists = True

    def __init__(self, proposals: list[Proposal]) -> None:
        self._proposals, self._next = proposals, 0

    def ask(self) -> Proposal | None:
        """The next of the list."""
        if self._next == len(self._proposals):
            return None
        self._next += 1
        return self._proposals[self._next - 1]

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """Nothing is learnt."""

    def summary(self) -> list[dict[str, Any]]:
        """Nothing to say."""
        return []

    def preview(self) -> Iterator[Proposal]:
        """The list."""
        return iter(self._proposals)
