"""The few-step grid of "Hyperparameters are all you need"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.processes import lam_range
from tasks.registry import times


@times.register("few_step")
@dataclass(frozen=True)
class FewStep:
    """A Karras grid cut short and laid again: a few steps that stop at a small noise level instead of at clean data.

    (a) A Karras grid of ``num_nodes`` levels with exponent ``rho``; (b) its first and its ``stop_node``-th level, as
    times; (c) N + 1 times between them with the Karras polynomial of exponent ``time_rho``. The state at the last one,
    still slightly noisy, is the sample. For 7 or 8 steps integrate with dpmpp_2m, for 4 to 6 with ddim.

    Args:
        num_steps: number of steps N.
        num_nodes: N_0, levels of the Karras grid.
        rho: its exponent.
        stop_node: the level at which sampling ends.
        time_rho: exponent of the polynomial in time.
        finish: add a last jump to clean data, for a comparison (one more step).

    Reference: Zhou et al. 2025, "Hyperparameters are all you need"; presets: 8 steps N_0=12, rho=7, stop 9; 5 and 6
    steps N_0=8, rho=5, stop 6; SDXL 8 steps N_0=12, rho=12, stop 10.
    """

    num_steps: int = 8
    num_nodes: int = 12
    rho: float = 7.0
    stop_node: int = 9
    time_rho: float = 1.2
    finish: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stop_node < self.num_nodes or self.num_steps < 1 or self.rho <= 0 or self.time_rho <= 0:
            raise ValueError(
                "few_step needs num_steps >= 1, 1 <= stop_node < num_nodes and positive exponents, got "
                f"{self.num_steps}, {self.stop_node}, {self.num_nodes}, {self.rho} and {self.time_rho}."
            )

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times, the last above 0 (N+1 steps and a last 0 with ``finish``)."""
        first, last = lam_range(process, start)
        ramp = np.linspace(math.exp(-first / self.rho), math.exp(-last / self.rho), self.num_nodes)
        stop = process.time(float(-self.rho * np.log(ramp[self.stop_node])))
        # The polynomial is laid in training steps, which count from 0 where t is one step above 0.
        offset = process.t_min if process.kind_of_path != "linear" else 0.0
        high, low = (start - offset) ** (1 / self.time_rho), (stop - offset) ** (1 / self.time_rho)
        nodes = np.linspace(high, low, self.num_steps + 1) ** self.time_rho + offset
        found = (start, *(float(t) for t in nodes[1:]))
        return (*found, 0.0) if self.finish else found
