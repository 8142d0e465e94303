"""Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments, frechet_distance, frechet_influence
from tasks.registry import Spec, features, metrics
from tasks.types import Rows, sample_shape


@metrics.register("frechet")
@dataclass(frozen=True)
class Frechet:
    """Fréchet distance between the samples' features and the reference data's (FID, with whichever features).

    Biased upwards by O(1/n): compare values at equal numbers of samples only.

    Args:
        features: name of the feature extractor.

    Reference: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
    """

    features: str = "classifier"

    better = {"quality/frechet": "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """More rows than features, else the covariance is rank-deficient."""
        dim = features.build(self.features).dim(sample_shape(model))
        if num_samples <= dim:
            raise ValueError(
                f"frechet is rank-deficient: {num_samples} rows for {dim} features. Raise num_samples above {dim} or "
                "use kid."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and covariance of the reference data's features."""
        if self.features == "identity" and hasattr(model, "moments"):
            mean, covariance = model.moments()
            return {"mean": mean, "covariance": covariance}
        moments = Moments.of(score(self.needs()[0], *model.reference()))
        return {"mean": moments.mean, "covariance": moments.covariance}

    def summarize(self, rows: Rows) -> Moments:
        """Moments of these rows."""
        return Moments.of(rows[self.features])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Moments of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The distance."""
        value = frechet_distance(summary.mean, summary.covariance, reference["mean"], reference["covariance"])
        return {"quality/frechet": value}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row."""
        x = rows[self.features]
        effect = frechet_influence(x, summary.mean, summary.covariance, reference["mean"], reference["covariance"])
        return {"quality/frechet": effect}
