"""A family of grids with three shape parameters, for searches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tasks.processes import lam_range
from tasks.registry import times


@times.register("curve")
@dataclass(frozen=True)
class Curve:
    """A smooth monotone curve of times: three numbers shape a grid of any number of steps.

    ``t_i = a_i^(1 - mix) b_i^mix``, the geometric mean of a grid in time and one in half log-SNR, both warped alike
    with ``r(u) = (1 - u^noise)^data``:

    * ``a_i = start r(i / N)``, which ends at 0;
    * ``b_i`` lies at ``lam_0 + (1 - r(i / (N - 1))) (lam_1 - lam_0)``, from the start to t_min, and ``b_N = 0``.

    1 - r is the distribution function of Kumaraswamy (1980). Where u is small it is ``data u^noise``, and near 1 it is
    ``1 - (noise (1 - u))^data``: an exponent above 1 crowds the nodes at its end, one below 1 thins them out. Both
    grids fall strictly for every value in ``box``, so their mean does too: every point of the box is a valid grid.

    Args:
        num_steps: number of steps N.
        mix: 0 lays the nodes in time, 1 in log-SNR; between 0 and 1.
        noise: exponent at the noisy end; between 0.25 and 4.
        data: exponent at the data; between 0.25 and 4.

    Reference: Kumaraswamy 1980, "A generalized probability density function for double-bounded random processes" (the
        warp); Song et al. 2021 and Lu et al. 2022 (the grids between which it lies).
    Identities: mix=0 noise=1 data=1 is ``uniform`` and mix=0 noise=1 data=power is ``quadratic``, bit for bit; mix=1
        noise=1 data=1 is ``logsnr``. ``karras`` with rho=7 is near mix=1 with (noise, data) = (1.26, 0.79) on a linear
        VP process, (1.29, 0.77) on EDM's and (1.39, 0.71) on a flow: no node is off by more than 2 % of the range of
        log-SNR.
    """

    num_steps: int = 10
    mix: float = 0.5
    noise: float = 1.0
    data: float = 1.0

    box: ClassVar[dict[str, tuple[float, float]]] = {"mix": (0.0, 1.0), "noise": (0.25, 4.0), "data": (0.25, 4.0)}

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")
        for name, (low, high) in self.box.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"times.{name} must be between {low:g} and {high:g}, got {getattr(self, name)}.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times."""
        last = self.num_steps
        if self.mix == 0:
            return (*(start * self._left(i / last) for i in range(last)), 0.0)
        low, high = lam_range(process, start)
        found = [start]
        for i in range(1, last):
            in_noise = process.time(low + (1.0 - self._left(i / (last - 1))) * (high - low))
            in_time = start * self._left(i / last)
            found.append(math.exp((1.0 - self.mix) * math.log(in_time) + self.mix * math.log(in_noise)))
        return (*found, 0.0)

    def _left(self, u: float) -> float:
        """What is left of the way after the share u of the steps, 1 … 0."""
        return (1.0 - u**self.noise) ** self.data
