"""Trajectory error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, features, metrics
from tasks.trajectories import MANY_STEP_SOLVER, MANY_STEPS
from tasks.types import Rows

NAME, COLUMN = "quality/trajectory_error", "trajectory_distance"


@metrics.register("trajectory")
@dataclass(frozen=True)
class Trajectory:
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
    paired = True  # its column compares rows with rows, so nothing else may read it

    def __post_init__(self) -> None:
        _ = self.needs()

    def needs(self) -> tuple[Spec, ...]:
        """The distances."""
        return (features.complete({"name": COLUMN, **_fields(self)}),)

    def check(self, model: Any, num_samples: int) -> None:
        """Any number; the recipe is checked with its companion."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed: every row has its own."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and mean of the squares."""
        return Moments.of(_squares(rows))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The root of the mean square."""
        return {NAME: float(np.sqrt(summary.mean[0]))}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """``(d_i^2 - mean) / (2 root)``; none where all distances are 0."""
        mean = summary.mean[0]
        effect = _squares(rows)[:, 0] - mean
        return {NAME: effect / (2.0 * np.sqrt(mean)) if mean > 0 else effect}


def _squares(rows: Rows) -> np.ndarray:
    return np.square(rows[COLUMN].astype(np.float64))


def _fields(metric: Trajectory) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in ("solver", "num_steps", "times")}
