"""Grids that minimise a bound on the divergence of the stochastic sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from tasks.processes import lam_range
from tasks.registry import times
from tasks.trajectories import later_only, shortest_path


@times.register("ays")
@dataclass(frozen=True)
class AlignYourSteps:
    """Align Your Steps: the grid that minimises the Kullback-Leibler upper bound of the first-order stochastic sampler.

    ``sum_i int_{rho_{i+1}}^{rho_i} rho^-3 E |D(x_rho, rho) - D(x_{rho_i}, rho_i)|^2 d rho`` in rho = sigma / alpha,
    where x_{rho_i} is x_rho noised further. Each term depends on the two ends of its interval alone, so on a fine
    lattice of noise levels the best grid is a shortest path: found exactly, where the paper searches node by node.

    Args:
        num_steps: number of steps N.
        num_levels: noise levels of the lattice, equally spaced in log-SNR.
        num_samples: noised data samples of the expectation.
        artifact: file with a grid made before, instead of calibrating.

    Reference: Sabour et al. 2024, "Align Your Steps: Optimizing Sampling Schedules in Diffusion Models", eq. 11.
    Cost: num_levels evaluations for each of num_samples, once for a model and guidance. A bound for stochastic
    samplers; for deterministic ones a heuristic.
    """

    num_steps: int = 10
    num_levels: int = 64
    num_samples: int = 256
    artifact: str = ""

    calibrated_on: ClassVar[tuple[str, ...]] = ("guidance", "initial", "labels", "seed", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps < self.num_levels or self.num_samples < 1:
            raise ValueError(
                "ays needs 1 <= num_steps < num_levels and num_samples >= 1, got "
                f"{self.num_steps}, {self.num_levels} and {self.num_samples}."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {"num_levels": self.num_levels, "num_samples": self.num_samples}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The lattice's times (M,) and the bound's term for every interval (M, M)."""
        process = bench.process
        first, last = lam_range(process, bench.parts.initial.start(process))
        lams = np.linspace(first, last, self.num_levels)
        rhos, nodes = np.exp(-lams), [process.time(float(lam)) for lam in lams]
        x0, cond = bench.data(self.num_samples)
        noise = bench.noise(self.num_samples)
        # One noise path a sample from the data outwards, so that every state is the next cleaner one noised further.
        path = torch.zeros_like(x0)
        answers: list[Any] = [None] * self.num_levels
        before = 0.0
        for m in range(self.num_levels - 1, -1, -1):
            fresh = noise.at(m).normal(tuple(x0.shape[1:]), purpose="path")
            path = path + float(np.sqrt(rhos[m] ** 2 - before**2)) * fresh
            before = rhos[m]
            answers[m] = bench.model.denoise(process.alpha(nodes[m]) * (x0 + path), nodes[m], cond).double()
        costs = np.full((self.num_levels, self.num_levels), np.inf)
        for i in range(self.num_levels - 1):
            gaps = np.array(
                [float((answers[j] - answers[i]).square().flatten(1).sum(1).mean()) for j in range(i, len(lams))]
            )  # d(rho) = -rho d(lam): the integrand is rho^-2 over log-SNR.
            heights = gaps / rhos[i:] ** 2
            pieces = 0.5 * (heights[1:] + heights[:-1]) * np.diff(lams[i:])
            costs[i, i + 1 :] = np.cumsum(pieces)
        return {"times": np.array(nodes), "costs": later_only(costs)}

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times, of which the last, the cleanest level, is replaced by 0; needs the calibration."""
        calibrated: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
        costs = np.where(calibrated["costs"] < 0, np.inf, calibrated["costs"])
        nodes = [float(calibrated["times"][i]) for i in shortest_path(costs, self.num_steps)]
        return (start, *nodes[1:-1], 0.0)
