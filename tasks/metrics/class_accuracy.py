"""Class accuracy of conditional samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics, rewards
from tasks.types import Rows


@metrics.register("class_accuracy")
@dataclass(frozen=True)
class ClassAccuracy:
    """Share of samples in which the classifier sees the class that was asked for.

    High accuracy is no proof of quality: one-step samples are class means, and score perfectly.

    Reference: Ravuri and Vinyals 2019, "Classification Accuracy Score for Conditional Generative Models".
    """

    better = {"quality/class_accuracy": "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The 0/1 column."""
        return (rewards.complete("class_correct"),)

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and mean."""
        return Moments.of(rows["class_correct"][:, None])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The share."""
        return {"quality/class_accuracy": float(summary.mean[0])}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the mean."""
        return {"quality/class_accuracy": rows["class_correct"].astype(np.float64) - summary.mean[0]}
