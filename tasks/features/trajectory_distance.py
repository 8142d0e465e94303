"""How far a sample is from where its trajectory ought to end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tasks.registry import Spec, features, solvers, times
from tasks.trajectories import MANY_STEP_SOLVER, MANY_STEPS


@features.register("trajectory_distance")
@dataclass(frozen=True)
class TrajectoryDistance:
    """Root mean square distance of a sample to the many-step solution from the same starting noise.

    ``d_i = sqrt(mean over elements of (x_i - y_i)^2)``, where y_i is row i of the companion recipe: the same model,
    guidance, labels, seed and numerics, but a fine grid. Both are compared as they are stored: exactly up to 4096
    numbers a sample; larger images to 8 bits, which alone makes a distance of about 0.003.

    Both trajectories start from the same standard normal draw, each at its own first time: where a grid begins below
    t=1, what it skips counts as an error too.

    Args:
        solver: spec of the companion's solver; deterministic.
        num_steps: steps of the companion.
        times: spec of the companion's grid; null takes equal steps in time on a flow, in log-SNR elsewhere. A grid
            that has ``num_steps`` and does not say them takes those above.

    Reference: Zhao et al. 2023, "UniPC", section 4, where the other solution is DDIM in very many steps.
    Cost: one many-step trajectory a sample, once for all trials that share model, guidance, labels and seed.
    Identities: the companion's distance to itself is 0.
    """

    solver: Spec = field(default_factory=lambda: {"name": MANY_STEP_SOLVER})
    num_steps: int = MANY_STEPS
    times: dict[str, Any] | None = None

    needs_labels = False
    revision = "1"

    def __post_init__(self) -> None:
        solver, grid = solvers.build(self.solver), times.build(self._times("uniform"))
        if self.num_steps < 1:
            raise ValueError(f"{self.name}.num_steps must be at least 1, got {self.num_steps}.")  # type: ignore[attr-defined]
        if solver.stochastic:
            raise ValueError(
                f"a many-step solution is found without noise, but solver {solver.name} draws some. Use heun."
            )
        if getattr(grid, "travels", False):
            raise ValueError(
                f"a many-step solution is found on a falling grid, but times {grid.name} rise. Use uniform."
            )

    def _times(self, usual: str) -> Spec:
        spec: Spec = {"name": usual} if self.times is None else dict(self.times)
        if "num_steps" in times.defaults(spec.get("name", "")):
            spec.setdefault("num_steps", self.num_steps)
        return spec

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape."""

    def dim(self, shape: tuple[int, ...]) -> int:
        """1."""
        return 1

    def companion(self, recipe: Any) -> Any:
        """The recipe of the many-step solution, from the same starting noise.

        Raises:
            ValueError: the recipe's trajectories do not follow the ODE from that noise.
        """
        parts = recipe.parts
        process = parts.model.noising
        strays = (
            (process.kind != "gaussian", f"model {recipe.model['name']} is {process.kind} and follows no ODE", "model"),
            (parts.solver.stochastic, f"solver {recipe.solver['name']} draws noise on the way", "solver"),
            (getattr(parts.times, "travels", False), f"times {recipe.times['name']} noise the state again", "times"),
            (recipe.initial["name"] != "prior", f"initial {recipe.initial['name']} begins elsewhere", "initial=prior"),
            (recipe.strategy["name"] != "single", f"strategy {recipe.strategy['name']} chooses", "strategy=single"),
        )
        for strays_here, why, instead in strays:
            if strays_here:
                change = f"Use {instead}" if "=" in instead else f"Use another {instead}"
                raise ValueError(
                    "a trajectory error compares a sample with the many-step solution of the ODE from the same "
                    f"starting noise, but {why}. {change}, or leave the metric out."
                )
        usual = "uniform" if process.kind_of_path == "linear" else "logsnr"
        found = recipe.override({"solver": self.solver, "times": self._times(usual), "reward": None})
        if found.calibrations:
            raise ValueError(
                "a many-step solution is found by a solver and times that need no calibration, got "
                f"{self.solver['name']} and {found.times['name']}. Use heun and logsnr."
            )
        return found

    def __call__(self, samples: Tensor, cond: Tensor | None, companion: Tensor) -> Tensor:
        """(B, 1) float64, in the units of the samples."""
        return (samples.double() - companion.double()).flatten(1).square().mean(dim=1, keepdim=True).sqrt()
