"""Free time steps in coordinates that a search can use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("ratios")
@dataclass(frozen=True)
class Ratios:
    """Free nodes for a search: each time is a fraction of the one before, ``t_{i+1} = r_i t_i``, from 1, then 0.

    Every point of the open unit cube is a valid grid and every grid is a point, so a search needs no constraint.

    Args:
        ratios: N-1 numbers strictly between 0 and 1.

    Reference: stick-breaking coordinates; none needed.
    """

    ratios: tuple[float, ...] = (0.75, 2 / 3, 0.5)

    def __post_init__(self) -> None:
        if not all(0 < r < 1 for r in self.ratios):
            raise ValueError(f"times.ratios must lie strictly between 0 and 1, got {list(self.ratios)}.")

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.ratios) + 1

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        nodes = [start]
        for ratio in self.ratios:
            nodes.append(nodes[-1] * ratio)
        return (*nodes, 0.0)
