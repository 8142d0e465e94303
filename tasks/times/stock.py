"""A stock scheduler's own grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("stock")
@dataclass(frozen=True)
class Stock:
    """The grid that a stock scheduler lays itself; only with ``solver=diffusers``.

    Args:
        num_steps: number of steps N given to ``set_timesteps``.

    Reference: diffusers; the scheduler's timestep_spacing and sigma options decide.
    """

    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """Refused: the solver lays this grid."""
        raise ValueError("times=stock is a stock scheduler's own grid. Use it with solver=diffusers.")
