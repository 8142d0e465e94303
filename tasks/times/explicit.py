"""Times given by their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("explicit")
@dataclass(frozen=True)
class Explicit:
    """The values themselves.

    Args:
        values: N+1 strictly decreasing times in [0, 1]. The last is 0 for finished samples; a positive last value stops
            there, which convergence tests need.

    Reference: none needed.
    """

    values: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)

    def __post_init__(self) -> None:
        if len(self.values) < 2 or not all(a > b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError(
                f"times.values must be two or more strictly decreasing times, got {list(self.values)}. "
                "Sort them from noise (1) to data (0)."
            )
        if self.values[0] > 1 or self.values[-1] < 0:
            raise ValueError(f"times.values must lie in [0, 1], got {list(self.values)}.")

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.values) - 1

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """The values."""
        return self.values
