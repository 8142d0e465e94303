"""Quadratic time steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("quadratic")
@dataclass(frozen=True)
class Quadratic:
    """Steps that shrink towards the data, ``t_i = (1 - i / N)^power``.

    Args:
        num_steps: number of steps N.
        power: 2 is the quadratic grid, 1 the uniform one.

    Reference: Song et al. 2021, DDIM, appendix D.2 (quadratic).
    """

    num_steps: int = 10
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")
        if self.power <= 0:
            raise ValueError(f"times.power must be positive, got {self.power}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        return tuple(start * (1.0 - i / self.num_steps) ** self.power for i in range(self.num_steps)) + (0.0,)
