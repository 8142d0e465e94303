"""Blocks that take turns: while one waits for its reward, which is scored elsewhere, the next one computes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 2  # one computes and one waits; each holds its own states in memory


class Turn:
    """A block's right to compute; only one block of a lock has it at a time.

    Attributes:
        seconds: how long this block had it.
    """

    def __init__(self, lock: Any) -> None:
        self._lock, self._since, self.seconds = lock, 0.0, 0.0

    def __enter__(self) -> Turn:
        self._lock.acquire()
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._since
        self._lock.release()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, another block computes."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Elsewhere:
    """A scorer that works in another process: its block gives its turn away meanwhile."""

    def __init__(self, scorer: Any, turn: Turn) -> None:
        self._scorer, self._turn = scorer, turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def __call__(self, samples: Any, cond: Any) -> Any:
        """The scorer's answer."""
        with self._turn.waiting():
            return self._scorer(samples, cond)


def in_turns(function: Callable[[Item, Any], Result], items: Iterable[Item], overlap: bool) -> Iterator[Result]:
    """``function(item, lock)`` of every item, in order; with ``overlap`` the next item begins before the last is done.

    Every call runs by itself, so results do not depend on the overlap.
    """
    lock = threading.Lock()
    if not overlap:
        for item in items:
            yield function(item, lock)
        return
    with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="block") as pool:
        flying: deque[Future[Result]] = deque()
        try:
            for item in items:
                flying.append(pool.submit(function, item, lock))
                if len(flying) == IN_FLIGHT:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
