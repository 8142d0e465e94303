"""Grids from the geometry of sampling trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tasks import registry
from tasks.registry import times, unknown
from tasks.trajectories import fine_grid, jump_costs, later_only, record, reference, shortest_path


@times.register("gits")
@dataclass(frozen=True)
class GITS:
    """Geometry-inspired time schedule: a dynamic programme over how far single steps stray from a reference trajectory.

    ``V[i, k] = min_j c(i, j) + gamma V[j, k - 1]``; the cost ``dev`` is the difference between the distances of the
    step's end and of the reference from the straight line between the trajectory's ends.

    Args:
        num_steps: number of steps N.
        num_fine: steps of the reference, a third-order multistep run (the paper's iPNDM).
        num_samples: reference trajectories.
        gamma: weight of later steps; the paper uses 1.15. It has to be tuned: try 0.8 to 1.2.
        cost: dev, l1 or l2.
        artifact: file with a grid made before, instead of calibrating.

    Reference: Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion Sampling", section 4.
    Cost: num_fine evaluations for each of num_samples trajectories, once for a model and guidance.
    """

    num_steps: int = 10
    num_fine: int = 60
    num_samples: int = 256
    gamma: float = 1.15
    cost: str = "dev"
    artifact: str = ""

    calibrated_on: ClassVar[tuple[str, ...]] = ("guidance", "initial", "labels", "seed", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= self.num_fine or self.num_samples < 1 or self.gamma <= 0:
            raise ValueError(
                "gits needs 1 <= num_steps <= num_fine, num_samples >= 1 and gamma > 0, got "
                f"{self.num_steps}, {self.num_fine}, {self.num_samples} and {self.gamma}."
            )
        if self.cost not in ("dev", "l1", "l2"):
            raise unknown("cost", self.cost, ["dev", "l1", "l2"], "Allowed")

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {"num_fine": self.num_fine, "num_samples": self.num_samples, "cost": self.cost}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The fine times (K + 1,) and the costs of every step between them (K + 1, K + 1)."""
        grid = fine_grid(bench.process, self.num_fine, bench.parts.initial.start(bench.process))
        teacher = registry.solvers.build({"name": "unified", "preset": "f_pndm"})
        found = record(reference(bench, self.num_samples, grid, teacher), bench.noise(self.num_samples))
        costs = jump_costs(bench.process, found, self.cost)
        return {"times": np.array(grid), "costs": later_only(costs)}

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times; needs the calibration."""
        calibrated: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
        costs = np.where(calibrated["costs"] < 0, np.inf, calibrated["costs"])
        return tuple(float(calibrated["times"][i]) for i in shortest_path(costs, self.num_steps, self.gamma))
