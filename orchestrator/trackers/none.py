"""No tracking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.registries import trackers


@trackers.register("none")
@dataclass(frozen=True)
class NoTracker:
    """Tell nobody: the store, the trial table and the report hold everything anyway.

    Reference: none needed.
    """

    def start(self, study: Any) -> NoTracker:
        """Itself."""
        return self

    def log(self, trial: Any) -> None:
        """Nothing."""

    def close(self, state: str, summary: Mapping[str, Any], artifacts: list[tuple[str, bytes]]) -> None:
        """Nothing."""
