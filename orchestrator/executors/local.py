"""In this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from orchestrator.registries import executors


@executors.register("local")
@dataclass(frozen=True)
class LocalExecutor:
    """Run every task here and now: simplest to debug, and what a cluster's results are compared with.

    Reference: none needed.
    """

    slots = 1

    def start(self) -> LocalExecutor:
        """Itself."""
        return self

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        """Run it; the future is finished when this returns."""
        future: Future = Future()
        try:
            future.set_result(function(task))
        except Exception as error:  # a task's failure is its result; an interrupt is not
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing to end."""
