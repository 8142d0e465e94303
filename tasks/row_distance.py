"""What metrics share that are a root mean square of distances, each of a row from a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec
from tasks.types import Rows


class RowDistance:
    """``sqrt(mean over rows i of d_i^2)``, with d_i the values of one column."""

    value: ClassVar[str]  # name of the result
    column: ClassVar[str]  # name of the distances
    paired = True  # its column compares rows with rows, so nothing else may read it

    def check(self, model: Any, num_samples: int) -> None:
        """Any number; the recipe is checked with its companion."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed: every row has its own."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and mean of the squares."""
        return Moments.of(self._squares(rows))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The root of the mean square."""
        return {self.value: float(np.sqrt(summary.mean[0]))}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """``(d_i^2 - mean) / (2 root)``; none where all distances are 0."""
        mean = summary.mean[0]
        effect = self._squares(rows)[:, 0] - mean
        return {self.value: effect / (2.0 * np.sqrt(mean)) if mean > 0 else effect}

    def _squares(self, rows: Rows) -> np.ndarray:
        return np.square(rows[self.column].astype(np.float64))
