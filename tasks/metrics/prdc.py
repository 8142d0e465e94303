"""Precision, recall, density and coverage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.kept import Kept, check_limit
from tasks.manifold import Overlap, overlap
from tasks.neighbours import nearest_others
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAMES = ("precision", "recall", "density", "coverage")


@metrics.register("prdc")
@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage: whether samples lie among the data, and the data among the samples.

    Around every point lies a ball that reaches to its k-th nearest other point of the same set. Precision: samples in
    some ball of the data. Recall: data in some ball of the samples. Density: balls of the data that hold a sample, over
    k (1 for equal laws; may exceed 1). Coverage: balls of the data that hold some sample; for equal laws with N items
    and M samples ``1 - prod_{j<k} (N - 1 - j) / (M + N - 1 - j)``, so compare values at equal numbers only. Uses the
    first ``max_samples`` rows in index order and of the reference. Standard errors of recall and coverage come from
    leaving rows out and are on the safe side.

    Args:
        features: name of the feature extractor, or its whole spec.
        k: the neighbour that a ball reaches to.
        max_samples: rows used.

    Reference: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric"; Naeem et al. 2020, "Reliable Fidelity
        and Diversity Metrics for Generative Models", eqs. 3 and 5.
    Cost: ``max_samples^2`` distances, three times.
    """

    features: str | dict[str, Any] = "classifier"
    k: int = 5
    max_samples: int = 4096

    compares_with_data = True
    better = {f"quality/{name}": "higher" for name in NAMES}

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"metric.k must be at least 1, got {self.k}.")

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """More rows than neighbours."""
        check_limit(self.max_samples, num_samples, self.k + 2, "prdc")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Features of the reference data, and how far their balls reach (squared)."""
        data = score(self.needs()[0], *model.reference())[: self.max_samples].astype(np.float64)
        if len(data) <= self.k:
            raise ValueError(f"prdc needs more than k={self.k} items of reference data, got {len(data)}.")
        return {"features": data, "radius": nearest_others(data, self.k)[0][:, -1]}

    def summarize(self, rows: Rows) -> Kept:
        """The first rows."""
        return Kept.of(rows[column(self.features)], self.max_samples)

    def merge(self, a: Kept, b: Kept) -> Kept:
        """The first rows of both, in order."""
        return a.merge(b)

    def compute(self, summary: Kept, reference: Any) -> dict[str, float]:
        """The four values."""
        found = self._measured(summary, reference)
        return {f"quality/{name}": found.values[name] for name in NAMES}

    def influence(self, summary: Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Effects of the rows; rows beyond ``max_samples`` have none."""
        found = self._measured(summary, reference)
        return {f"quality/{name}": summary.spread(found.effects[name], rows["position"]) for name in NAMES}

    def _measured(self, summary: Kept, reference: Any) -> Overlap:
        data, radius = reference["features"], reference["radius"]
        return summary.once(data, lambda: overlap(summary.features, data, radius, self.k))
