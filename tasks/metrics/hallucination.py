"""Hallucination score from trajectory variance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics
from tasks.types import Rows

COLUMN = "trajectory_variance"
MEAN, RATE = "quality/trajectory_variance", "quality/hallucination"


@metrics.register("hallucination")
@dataclass(frozen=True)
class Hallucination:
    """How much clean predictions waver at the end of a trajectory, as they do for samples between modes of the data.

    The score of a row is ``h``, the variance of its clean predictions over the last steps, which strategy
    ``variance_filter`` writes beside every row (with ``strategy.n=1`` it samples as ``single`` does and costs nothing
    more). Reported are its mean, and with a threshold the share of rows above it. h depends on the solver and its grid,
    and injected noise raises it: compare it at one sampler only.

    Args:
        threshold: h above which a sample counts as a hallucination; null reports the mean alone.

    Reference: Aithal et al. 2024, "Understanding Hallucinations in Diffusion Models through Mode Interpolation",
        section 5.
    """

    threshold: float | None = None

    columns = (COLUMN,)

    @property
    def better(self) -> dict[str, str]:
        """Less is better."""
        return {name: "lower" for name in ((MEAN,) if self.threshold is None else (MEAN, RATE))}

    def needs(self) -> tuple[Spec, ...]:
        """No scorer: the rows have it."""
        return ()

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def check_recipe(self, recipe: Any) -> None:
        """A strategy that watches trajectories."""
        if recipe.strategy["name"] != "variance_filter":
            raise ValueError(
                f"metric hallucination reads the column {COLUMN}, which strategy {recipe.strategy['name']} does not "
                "write. Use strategy=variance_filter, with strategy.n=1 for plain samples."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def _per_row(self, rows: Rows) -> np.ndarray:
        h = rows[COLUMN].astype(np.float64)
        return np.stack([h] if self.threshold is None else [h, (h > self.threshold).astype(np.float64)], axis=1)

    def summarize(self, rows: Rows) -> Moments:
        """Count and means."""
        return Moments.of(self._per_row(rows))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The means."""
        return dict(zip(self.better, map(float, summary.mean), strict=True))

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviations from the means."""
        return dict(zip(self.better, (self._per_row(rows) - summary.mean).T, strict=True))
