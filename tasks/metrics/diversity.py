"""Diversity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows


@metrics.register("diversity")
@dataclass(frozen=True)
class Diversity:
    """Mean squared distance between two samples, over that between two items of the data: 1 is as diverse as the data.

    Twice the trace of the unbiased covariance is the mean over all pairs, so this is a ratio of traces. Searching or
    steering towards a reward lowers it where samples become alike.

    Args:
        features: name of the feature extractor, or its whole spec.

    Reference: none needed; the mean pairwise distance, as in "Intra-LPIPS" (Ojha et al. 2021), in other features.
    """

    features: str | dict[str, Any] = "classifier"

    compares_with_data = True
    better = {"quality/diversity": "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """Two rows at least."""
        if num_samples < 2:
            raise ValueError(
                f"diversity compares samples with each other: num_samples must be 2 at least, got {num_samples}."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """The data's own trace."""
        if column(self.features) == "identity" and hasattr(model, "moments"):
            return {"trace": np.trace(model.moments()[1])}
        return {"trace": np.trace(Moments.of(score(self.needs()[0], *model.reference())).covariance)}

    def summarize(self, rows: Rows) -> Moments:
        """Moments of these rows."""
        return Moments.of(rows[column(self.features)])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Moments of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The ratio."""
        return {"quality/diversity": float(np.trace(summary.covariance) / reference["trace"])}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row."""
        centred = np.asarray(rows[column(self.features)], dtype=np.float64) - summary.mean
        effect = np.square(centred).sum(axis=1) - np.trace(summary.scatter) / summary.count
        return {"quality/diversity": effect / float(reference["trace"])}
