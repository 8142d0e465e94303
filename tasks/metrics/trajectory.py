"""Trajectory error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tasks.registry import Spec, features, metrics
from tasks.row_distance import RowDistance
from tasks.trajectories import MANY_STEP_SOLVER, MANY_STEPS

NAME, COLUMN = "quality/trajectory_error", "trajectory_distance"


@metrics.register("trajectory")
@dataclass(frozen=True)
class Trajectory(RowDistance):
    """Root mean square distance of the samples to the many-step solutions from the same starting noise.

    ``sqrt(mean over rows i of d_i^2)`` with d_i the row's own distance (features ``trajectory_distance``). It measures
    a solver and its grid alone, not the model: the many-step solution scores 0 even where its samples are poor, and a
    better sample that left its trajectory scores worse. Much less noisy than a distance between distributions, since
    every row has its own target.

    Args:
        solver: spec of the many-step solver; deterministic.
        num_steps: its number of steps.
        times: spec of its grid; null takes equal steps in time on a flow, in log-SNR elsewhere.

    Reference: Zhao et al. 2023, "UniPC", section 4, where the other solution is DDIM in very many steps.
    Cost: one many-step trajectory a sample, made once for all trials of a model and guidance.
    Identities: the many-step solution's error is 0; a solver of order p has errors that fall as N^-p.
    """

    solver: Spec = field(default_factory=lambda: {"name": MANY_STEP_SOLVER})
    num_steps: int = MANY_STEPS
    times: dict[str, Any] | None = None

    better = {NAME: "lower"}
    value, column = NAME, COLUMN

    def __post_init__(self) -> None:
        _ = self.needs()

    def needs(self) -> tuple[Spec, ...]:
        """The distances."""
        return (features.complete({"name": COLUMN, **_fields(self)}),)


def _fields(metric: Trajectory) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in ("solver", "num_steps", "times")}
