"""Analytical teleportation: skip the first part of the trajectory in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tasks.registry import initials
from tasks.statistics import flow, gaussian_statistics, pick
from tasks.types import Noise


@initials.register("teleport")
@dataclass(frozen=True)
class Teleport:
    """Gaussian teleportation: from pure noise to sigma / alpha = ``rho`` along the flow of the data's Gaussian.

    ``x_s = alpha_s mu + sum_k sqrt((alpha_s^2 v_k + sigma_s^2) / (alpha_t^2 v_k + sigma_t^2)) u_k u_k^T (x_t - alpha_t
    mu)``. At high noise the score of any data is that of their Gaussian, so the part that is skipped costs nothing; the
    grid is laid anew from where it ends.

    Args:
        rho: noise level sigma / alpha at which sampling begins; 10 to 25 is safe, lower skips more.
        rank: leading principal directions; null keeps all.
        num_data: samples from which mean and covariance are taken.
        per_class: use the statistics of each row's class where the model has classes.
        artifact: file with statistics made before.

    Reference: Wang and Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
    Models and its Applications", section 5.
    Cost: none; one pass over the data for the statistics.
    Identities: exact for Gaussian data, wherever it ends.
    """

    rho: float = 10.0
    rank: int | None = None
    num_data: int = 10000
    per_class: bool = True
    artifact: str = ""

    evaluations = 0
    calibrated_on: ClassVar[tuple[str, ...]] = ()
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not self.rho > 0 or self.num_data < 2 or (self.rank is not None and self.rank < 1):
            raise ValueError(
                f"teleport needs rho > 0, num_data >= 2 and rank >= 1, got {self.rho}, {self.num_data} and {self.rank}."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {"rank": self.rank, "num_data": self.num_data, "per_class": self.per_class}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """Mean, eigenvectors and eigenvalues of the data."""
        x0, cond = bench.data(self.num_data)
        return gaussian_statistics(x0, cond if self.per_class else None, bench.model.num_classes, self.rank)

    def start(self, process: Any) -> float:
        """The time at which the noise level is rho."""
        return min(1.0, process.time(-math.log(self.rho)))

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) states at the first time of the grid."""
        process = sampler.model.process
        x = process.prior(sampler.model.shape, noise, 1.0)
        statistics: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
        chosen = pick(statistics, sampler.cond if self.per_class else None, x)
        return flow(process, x, 1.0, sampler.times[0], chosen)
