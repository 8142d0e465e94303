"""Karras et al.'s grid of noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.processes import lam_range, times_from_lam
from tasks.registry import times


@times.register("karras")
@dataclass(frozen=True)
class Karras:
    """EDM's grid: ``(sigma / alpha)^(1/rho)`` equally spaced from its largest to its smallest value, then 0.

    Args:
        num_steps: number of steps N.
        rho: larger puts more nodes at low noise.

    Reference: Karras et al. 2022, eq. 5.
    """

    num_steps: int = 10
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.rho <= 0:
            raise ValueError(f"karras needs num_steps >= 1 and rho > 0, got {self.num_steps} and {self.rho}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        first, last = lam_range(process, start)
        ramp = np.linspace(math.exp(-first / self.rho), math.exp(-last / self.rho), self.num_steps)
        return times_from_lam(process, start, -self.rho * np.log(ramp))
