"""Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.checkpoint import file_digest
from tasks.moments import Moments, check_statistics, frechet_distance, frechet_influence, reference_moments
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows, sample_shape


@metrics.register("frechet")
@dataclass(frozen=True)
class Frechet:
    """Fréchet distance between the samples' features and the reference data's (FID, with whichever features).

    Biased upwards by O(1/n): compare values at equal numbers of samples only.

    Args:
        features: name of the feature extractor, or its whole spec.
        statistics: .npz file with mu and sigma of the same features of some data; null takes the model's own data.

    Reference: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6.
    """

    features: str | dict[str, Any] = "classifier"
    statistics: str | None = None

    better = {"quality/frechet": "lower"}

    @property
    def compares_with_data(self) -> bool:
        """Whether the model's own data are needed."""
        return not self.statistics

    @property
    def revision(self) -> str:
        """Of what the file says; of the code where there is none."""
        return file_digest(Path(self.statistics).expanduser()) if self.statistics else "1"

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """More rows than features, else the covariance is rank-deficient."""
        dim = features.build(self.features).dim(sample_shape(model))
        check_statistics(self.statistics, dim)
        if num_samples <= dim:
            raise ValueError(
                f"frechet is rank-deficient: {num_samples} rows for {dim} features. Raise num_samples above {dim} or "
                "use kid."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and covariance of the reference data's features."""
        return reference_moments(self.features, model, score, self.statistics)

    def summarize(self, rows: Rows) -> Moments:
        """Moments of these rows."""
        return Moments.of(rows[column(self.features)])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Moments of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The distance."""
        value = frechet_distance(summary.mean, summary.covariance, reference["mean"], reference["covariance"])
        return {"quality/frechet": value}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row."""
        effect = frechet_influence(rows[column(self.features)], summary, reference["mean"], reference["covariance"])
        return {"quality/frechet": effect}
