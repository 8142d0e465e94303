"""Kernel inception distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.registry import Spec, features, metrics
from tasks.types import Rows


@dataclass(frozen=True)
class _Kept:
    count: int
    features: np.ndarray


@metrics.register("kid")
@dataclass(frozen=True)
class KID:
    """Unbiased squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``.

    Unbiased, so it may be compared across numbers of samples and can be negative near zero. Uses the first
    ``max_samples`` rows in index order, which bounds memory and keeps merging associative.

    Args:
        features: name of the feature extractor.
        max_samples: rows used, of the samples and of the reference alike.

    Reference: Bińkowski et al. 2018, "Demystifying MMD GANs", eq. 3 and section 4.
    """

    features: str = "classifier"
    max_samples: int = 4096

    better = {"quality/kid": "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """At least two rows."""
        if self.max_samples < 2:
            raise ValueError(f"metric.max_samples must be at least 2, got {self.max_samples}.")
        if num_samples < 2:
            raise ValueError(f"kid needs at least 2 rows, got num_samples={num_samples}.")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Features of the reference data, and the mean of its own kernel."""
        data = score(self.needs()[0], *model.reference())[: self.max_samples].astype(np.float64)
        kernel = self._kernel(data, data)
        count = len(data)
        return {"features": data, "within": np.array((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))}

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def summarize(self, rows: Rows) -> _Kept:
        """The first rows."""
        x = rows[self.features]
        return _Kept(len(x), x[: self.max_samples].astype(np.float64))

    def merge(self, a: _Kept, b: _Kept) -> _Kept:
        """The first rows of both, in order."""
        room = self.max_samples - len(a.features)
        return _Kept(a.count + b.count, np.concatenate([a.features, b.features[: max(room, 0)]]))

    def compute(self, summary: _Kept, reference: Any) -> dict[str, float]:
        """The unbiased estimate."""
        x, y = summary.features, reference["features"]
        n = len(x)
        kernel = self._kernel(x, x)
        within = (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
        return {"quality/kid": float(within + reference["within"] - 2.0 * self._kernel(x, y).mean())}

    def influence(self, summary: _Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row (Hoeffding projection); rows beyond ``max_samples`` have none."""
        x, kept, y = rows[self.features].astype(np.float64), summary.features, reference["features"]
        n = len(kept)
        own = self._kernel(x, kept).sum(axis=1) - (np.einsum("bd,bd->b", x, x) / x.shape[1] + 1.0) ** 3
        within = self._kernel(kept, kept)
        centre = (within.sum() - np.trace(within)) / (n * (n - 1)) - self._kernel(kept, y).mean()
        effect = 2.0 * (own / (n - 1) - self._kernel(x, y).mean(axis=1) - centre)
        used = np.arange(len(x)) + rows["position"][0] < n
        # A row's weight in a mean over all rows; unused rows must not shrink the standard error.
        return {"quality/kid": np.where(used, effect, np.nan)}
