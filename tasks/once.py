"""A value that is worked out once for a partner, and again only for another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Once:
    """Remembers what was made for the last partner, by identity: for work that every chunk of rows would repeat."""

    def __init__(self) -> None:
        self._partner: Any = None
        self._value: Any = None

    def __call__(self, partner: Any, make: Callable[[], Any]) -> Any:
        """The value for this partner; ``make`` is called where the last one was another."""
        if self._value is None or self._partner is not partner:
            self._partner, self._value = partner, make()
        return self._value
