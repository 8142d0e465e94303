"""What a sample cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics
from tasks.types import Rows

COUNTS = ("nfe", "reward_calls", "decodes", "work")


@metrics.register("cost")
@dataclass(frozen=True)
class Cost:
    """Network evaluations, reward calls and decoder calls per sample: budgets side by side, never added.

    Seconds are in the trial table, but no metric: they are not the same again.

    Where blocks of the network are left out, or parts of evaluations are spared, ``cost/work`` says what the
    evaluations come to in whole networks, by multiply-adds; elsewhere it would be ``cost/nfe`` again and is not shown.

    Reference: none needed.
    """

    revision = "2"
    better = {f"cost/{name}": "lower" for name in COUNTS}

    def needs(self) -> tuple[Spec, ...]:
        """Columns that every row has."""
        return ()

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and means."""
        return Moments.of(np.stack([rows[name] for name in COUNTS if name in rows], axis=1))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The means."""
        found = dict(zip(COUNTS, map(float, summary.mean), strict=False))
        # Rows of before decoder calls were counted do not know theirs.
        return {f"cost/{name}": value for name, value in found.items() if name != "decodes" or value == value}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the means."""
        known = self.compute(summary, reference)
        return {name: rows[name[5:]].astype(np.float64) - value for name, value in known.items()}
