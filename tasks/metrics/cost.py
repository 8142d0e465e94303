"""What a sample cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics
from tasks.types import Rows


@metrics.register("cost")
@dataclass(frozen=True)
class Cost:
    """Network evaluations and reward calls per sample: two budgets, reported side by side and never added.

    Reference: none needed.
    """

    better = {"cost/nfe": "lower", "cost/reward_calls": "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """Columns that every row has."""
        return ()

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and means."""
        return Moments.of(np.stack([rows["nfe"], rows["reward_calls"]], axis=1))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """Both means."""
        return {"cost/nfe": float(summary.mean[0]), "cost/reward_calls": float(summary.mean[1])}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the means."""
        return {
            "cost/nfe": rows["nfe"].astype(np.float64) - summary.mean[0],
            "cost/reward_calls": rows["reward_calls"].astype(np.float64) - summary.mean[1],
        }
