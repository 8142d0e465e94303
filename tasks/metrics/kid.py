"""Kernel inception distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.discrepancy import own_means, value_and_effects
from tasks.kept import Kept, check_limit
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAME = "quality/kid"


@metrics.register("kid")
@dataclass(frozen=True)
class KID:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``.

    Unbiased, so it may be compared across numbers of samples and can be negative near zero. Uses the first
    ``max_samples`` rows in index order, which bounds memory and keeps merging associative; its standard error is
    that of the whole U-statistic, in place of the spread over random subsets.

    Args:
        features: name of the feature extractor, or its whole spec.
        max_samples: rows used, of the samples and of the reference alike.

    Reference: Bińkowski et al. 2018, "Demystifying MMD GANs", eq. 3 and section 4.
    """

    features: str | dict[str, Any] = "classifier"
    max_samples: int = 4096

    compares_with_data = True
    better = {NAME: "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """At least two rows."""
        check_limit(self.max_samples, num_samples, 2, "kid")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Features of the reference data, and the mean of its own kernel."""
        data = score(self.needs()[0], *model.reference())[: self.max_samples].astype(np.float64)
        return {"features": data, "within": np.array(own_means(data, _kernel, unbiased=True).mean())}

    def summarize(self, rows: Rows) -> Kept:
        """The first rows."""
        return Kept.of(rows[column(self.features)], self.max_samples)

    def merge(self, a: Kept, b: Kept) -> Kept:
        """The first rows of both, in order."""
        return a.merge(b)

    def compute(self, summary: Kept, reference: Any) -> dict[str, float]:
        """The unbiased estimate."""
        return {NAME: _measured(summary, reference)[0]}

    def influence(self, summary: Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row; rows beyond ``max_samples`` have none."""
        return {NAME: summary.spread(_measured(summary, reference)[1], rows["position"])}


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _measured(summary: Kept, reference: Any) -> tuple[float, np.ndarray]:
    data, within = reference["features"], float(reference["within"])
    return summary.once(data, lambda: value_and_effects(summary.features, data, within, _kernel, unbiased=True))
