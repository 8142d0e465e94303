"""What savings changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, features, metrics
from tasks.types import Rows

NAME, COLUMN = "quality/acceleration_distance", "acceleration_distance"


@metrics.register("acceleration")
@dataclass(frozen=True)
class Acceleration:
    """Root mean square distance of the samples to those made without savings, row by row at equal seeds.

    ``sqrt(mean over rows i of d_i^2)`` with d_i the row's own distance (features ``acceleration_distance``). What was
    saved is in ``cost/nfe`` and ``cost/work``; seconds are in the trial table.

    Reference: none needed; published tables have LPIPS or PSNR against the unaccelerated images.
    Cost: one trajectory without savings a sample, once for all trials that differ in savings alone.
    """

    better = {NAME: "lower"}
    paired = True  # its column compares rows with rows, so nothing else may read it

    def needs(self) -> tuple[Spec, ...]:
        """The distances."""
        return (features.complete({"name": COLUMN}),)

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
