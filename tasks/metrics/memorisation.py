"""Memorisation rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.kept import Kept, check_limit
from tasks.neighbours import nearest, nearest_others
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAME = "quality/memorisation"


@metrics.register("memorisation")
@dataclass(frozen=True)
class Memorisation:
    """Share of samples that lie closer to an item of the data than its items lie to each other, but for a few.

    A sample counts when the distance to its nearest item is at most the ``level`` quantile of the distances from the
    items to their nearest others. So new draws from the data's own law count at about the rate ``level``, which is
    the value of a model that memorises nothing; copies of items count always. Exact duplicates in the data lower the
    threshold, in the end to exact copies. Uses the first ``max_samples`` rows in index order, and all of the data:
    give the data that the model was trained on.

    Args:
        features: name of the feature extractor, or its whole spec.
        level: the rate of a model that memorises nothing.
        max_samples: rows used.

    Reference: Carlini et al. 2023, "Extracting Training Data from Diffusion Models", section 5, with the threshold
        calibrated on the data.
    Cost: the distances between ``max_samples`` rows and the data, and once those within the data.
    """

    features: str | dict[str, Any] = "classifier"
    level: float = 0.01
    max_samples: int = 4096

    compares_with_data = True
    better = {NAME: "lower"}

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"metric.level must lie between 0 and 1, got {self.level}.")

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """One row at least."""
        check_limit(self.max_samples, num_samples, 1, "memorisation")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Features of the data, and the threshold (squared)."""
        data = score(self.needs()[0], *model.reference()).astype(np.float64)
        if len(data) * self.level < 1:
            raise ValueError(
                f"memorisation cannot find the {self.level} quantile of {len(data)} items. Raise metric.level to "
                f"{1 / len(data):.2g} or more."
            )
        return {"features": data, "threshold": np.quantile(nearest_others(data, 1)[0][:, 0], self.level)}

    def summarize(self, rows: Rows) -> Kept:
        """The first rows."""
        return Kept.of(rows[column(self.features)], self.max_samples)

    def merge(self, a: Kept, b: Kept) -> Kept:
        """The first rows of both, in order."""
        return a.merge(b)

    def compute(self, summary: Kept, reference: Any) -> dict[str, float]:
        """The share."""
        return {NAME: float(self._copies(summary, reference).mean())}

    def influence(self, summary: Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the share; rows beyond ``max_samples`` have none."""
        copies = self._copies(summary, reference)
        return {NAME: summary.spread(copies - copies.mean(), rows["position"])}

    def _copies(self, summary: Kept, reference: Any) -> np.ndarray:
        data = reference["features"]
        # A copy's distance is 0 only up to rounding of |x|^2 + |y|^2 - 2 x.y.
        slack = 1e-12 * np.square(data).sum(axis=1).max()
        threshold = float(reference["threshold"]) + slack
        return summary.once(data, lambda: (nearest(summary.features, data) <= threshold).astype(np.float64))
