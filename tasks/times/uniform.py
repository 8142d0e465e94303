"""Uniform time steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Equal steps, ``t_i = 1 - i / N``: diffusers calls this grid "trailing".

    Args:
        num_steps: number of steps N.

    Reference: Song et al. 2021, DDIM, appendix D.2 (linear); Lin et al. 2024 (trailing).
    """

    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        return tuple(start * (1.0 - i / self.num_steps) for i in range(self.num_steps)) + (0.0,)
