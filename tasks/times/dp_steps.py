"""Step sizes by dynamic programming over reference trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tasks import registry
from tasks.registry import times
from tasks.trajectories import fine_grid, jump_costs, later_only, record, reference, shortest_path


@times.register("dp_steps")
@dataclass(frozen=True)
class DPSteps:
    """The N-step grid whose first-order steps leave a fine reference trajectory least: Bellman-optimal step sizes.

    ``V[i, k] = min_j c(i, j) + V[j, k - 1]`` with c the mean squared distance between a single step from the
    reference's state at node i and its state at node j. On a flow this is stage 1 of BOSS; on the other processes the
    same with DDIM steps over a fine grid in log-SNR.

    Args:
        num_steps: number of steps N.
        num_fine: steps K of the reference.
        num_samples: reference trajectories.
        artifact: file with a grid made before, instead of calibrating.

    Reference: Nguyen et al. 2023, "Bellman Optimal Stepsize Straightening of Flow-Matching Models", section 3.1 (stage
        1).
    Cost: num_fine evaluations for each of num_samples trajectories, once for a model and guidance.
    """

    num_steps: int = 10
    num_fine: int = 100
    num_samples: int = 100
    artifact: str = ""

    calibrated_on: ClassVar[tuple[str, ...]] = ("guidance", "initial", "labels", "seed", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= self.num_fine or self.num_samples < 1:
            raise ValueError(
                "dp_steps needs 1 <= num_steps <= num_fine and num_samples >= 1, got "
                f"{self.num_steps}, {self.num_fine} and {self.num_samples}."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on: one matrix serves every number of steps."""
        return {"num_fine": self.num_fine, "num_samples": self.num_samples}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The fine times (K + 1,) and the costs of every step between them (K + 1, K + 1)."""
        grid = fine_grid(bench.process, self.num_fine, bench.parts.initial.start(bench.process))
        euler = registry.solvers.build("euler")
        found = record(reference(bench, self.num_samples, grid, euler), bench.noise(self.num_samples))
        costs = jump_costs(bench.process, found, "l2")
        return {"times": np.array(grid), "costs": later_only(costs)}

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times; needs the calibration."""
        calibrated: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
        costs = np.where(calibrated["costs"] < 0, np.inf, calibrated["costs"])
        return tuple(float(calibrated["times"][i]) for i in shortest_path(costs, self.num_steps))
