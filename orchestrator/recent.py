"""The last warnings and errors of a run, for whoever looks at it from outside."""

from __future__ import annotations

import logging
from collections import deque

from orchestrator.redact import redact


class Recent(logging.Handler):
    """Keeps the newest records of a logger, without secrets.

    Args:
        most: how many.
    """

    def __init__(self, most: int = 5) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[tuple[float, str]] = deque(maxlen=most)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._kept.append((record.created, redact(record.getMessage())[:500]))

    def lines(self) -> list[tuple[float, str]]:
        """(Unix time, text), oldest first."""
        return list(self._kept)
