"""One search after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.ports import Proposal, Search, SearchContext
from orchestrator.registries import searches


@searches.register("sequence")
@dataclass(frozen=True)
class Sequence:
    """Several searches, one after another: the questions of one study.

    Args:
        parts: specs of searches; each starts when the one before has nothing in flight any more.

    Reference: none needed.
    """

    parts: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("search sequence has no parts. Set search.parts to a list of searches.")
        for spec in self.parts:
            searches.build(spec)

    def start(self, context: SearchContext) -> _Running:
        """The first part."""
        return _Running([searches.build(spec).start(context) for spec in self.parts])


class _Running:
    def __init__(self, parts: list[Search]) -> None:
        self._parts, self._current, self._flying = parts, 0, 0

    @property
    def lists(self) -> bool:
        """Whether the preview is what will be proposed: equal trials share their rows."""
        return all(getattr(part, "lists", False) for part in self._parts)

    def ask(self) -> Proposal | None:
        """From the current part; the next one when this has nothing left and nothing in flight."""
        while self._current < len(self._parts):
            found = self._parts[self._current].ask()
            if found is not None:
                self._flying += 1
                return replace(found, handle=(self._current, found))
            if self._flying:
                return None
            self._current += 1
        return None

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """To the part that proposed it."""
        part, inner = proposal.handle
        self._flying -= 1
        self._parts[part].tell(inner, values)

    def summary(self) -> list[dict[str, Any]]:
        """All parts'."""
        return [entry for part in self._parts for entry in part.summary()]

    def preview(self) -> Iterator[Proposal]:
        """All parts'."""
        for part in self._parts:
            yield from part.preview()
