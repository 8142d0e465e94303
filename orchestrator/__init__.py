"""The plumbing of Solvus: studies, plans, the store, executors, searches and trackers around ``tasks``.

From Python: ``from orchestrator import run, open_study`` (:mod:`orchestrator.api`), imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.api import OpenStudy, Samples, open_study, run

__all__ = ["OpenStudy", "Samples", "open_study", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from orchestrator import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
