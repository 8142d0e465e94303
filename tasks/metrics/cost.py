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

    Where steps leave out blocks of the network, ``cost/work`` says what the evaluations come to in whole networks, by
    multiply-adds; elsewhere it would be ``cost/nfe`` again and is not shown.

    Reference: none needed.
    """

    better = {"cost/nfe": "lower", "cost/reward_calls": "lower", "cost/work": "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """Columns that every row has."""
        return ()

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and means."""
        return Moments.of(np.stack([rows[column] for column in _COLUMNS if column in rows], axis=1))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The means."""
        return {f"cost/{column}": float(mean) for column, mean in zip(_COLUMNS, summary.mean, strict=False)}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the means."""
        pairs = zip(_COLUMNS, summary.mean, strict=False)
        return {f"cost/{column}": rows[column].astype(np.float64) - mean for column, mean in pairs}


_COLUMNS = ("nfe", "reward_calls", "work")
