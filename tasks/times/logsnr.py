"""Equal steps in log-SNR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.processes import lam_range, times_from_lam
from tasks.registry import times


@times.register("logsnr")
@dataclass(frozen=True)
class LogSNR:
    """Nodes equally spaced in half log-SNR from t=1 to t_min, then 0.

    Args:
        num_steps: number of steps N.

    Reference: Lu et al. 2022, DPM-Solver, section 3.4.
    """

    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        return times_from_lam(process, start, np.linspace(*lam_range(process, start), self.num_steps))
