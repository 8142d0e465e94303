"""CLIP maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.discrepancy import own_means, value_and_effects
from tasks.kept import Kept, check_limit
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAME = "quality/cmmd"


@metrics.register("cmmd")
@dataclass(frozen=True)
class CMMD:
    """Squared maximum mean discrepancy of normalised CLIP embeddings, kernel ``exp(-|x - y|^2 / (2 sigma^2))``.

    Times 1000, as published. The published estimator counts the pair of a row with itself and so is biased upwards by
    O(1/n); with the wide kernel of unit vectors the bias is about ``1000 (1 - E k) / n``. It assumes no normality. Uses
    the first ``max_samples`` rows in index order, of the samples and of the reference alike.

    Args:
        features: name of the feature extractor, or its whole spec.
        sigma: width of the kernel.
        max_samples: rows used.

    Reference: Jayasumana et al. 2024, "Rethinking FID: Towards a Better Evaluation Metric for Image Generation",
        section 4.
    """

    features: str | dict[str, Any] = "clip"
    sigma: float = 10.0
    max_samples: int = 4096

    compares_with_data = True
    better = {NAME: "lower"}

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"metric.sigma must be positive, got {self.sigma}.")

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """At least two rows."""
        check_limit(self.max_samples, num_samples, 2, "cmmd")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Unit embeddings of the reference data, and the mean of its own kernel."""
        data = _unit(score(self.needs()[0], *model.reference())[: self.max_samples])
        return {"features": data, "within": np.array(own_means(data, self._kernel, unbiased=False).mean())}

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2.0 * a @ b.T
        return np.exp(np.clip(squared, 0.0, None) / (-2.0 * self.sigma**2))

    def summarize(self, rows: Rows) -> Kept:
        """The first rows."""
        return Kept.of(_unit(rows[column(self.features)][: self.max_samples]), self.max_samples)

    def merge(self, a: Kept, b: Kept) -> Kept:
        """The first rows of both, in order."""
        return a.merge(b)

    def compute(self, summary: Kept, reference: Any) -> dict[str, float]:
        """The biased estimate, times 1000."""
        return {NAME: 1000.0 * self._measured(summary, reference)[0]}

    def influence(self, summary: Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row; rows beyond ``max_samples`` have none."""
        return {NAME: 1000.0 * summary.spread(self._measured(summary, reference)[1], rows["position"])}

    def _measured(self, summary: Kept, reference: Any) -> tuple[float, np.ndarray]:
        data, within = reference["features"], float(reference["within"])
        return summary.once(
            data, lambda: value_and_effects(summary.features, data, within, self._kernel, unbiased=False)
        )


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    x = x.astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)
