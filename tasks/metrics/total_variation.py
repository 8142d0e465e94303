"""Total variation distance to an exact table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.registry import Spec, features, metrics
from tasks.types import Rows


@metrics.register("total_variation")
@dataclass(frozen=True)
class TotalVariation:
    """Half the absolute difference between the histogram of token strings and the model's exact table.

    Positive even for exact samples, by about ``sqrt(number of strings / n)``: compare at equal numbers of samples only.

    Reference: Levin and Peres 2017, "Markov Chains and Mixing Times", proposition 4.2.
    """

    better = {"quality/total_variation": "lower"}

    def needs(self) -> tuple[Spec, ...]:
        """The tokens."""
        return (features.complete("identity"),)

    def check(self, model: Any, num_samples: int) -> None:
        """An enumerable table."""
        if not hasattr(model, "joint"):
            raise ValueError("total_variation needs a model with an explicit table (model=table).")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """The exact probabilities and the place value of every token."""
        base = model.vocabulary ** np.arange(model.length - 1, -1, -1)
        return {"joint": model.joint, "base": base}

    def summarize(self, rows: Rows) -> dict[Any, int]:
        """Count of every string met."""
        strings, counts = np.unique(rows["identity"].astype(np.int64), axis=0, return_counts=True)
        return {tuple(map(int, string)): int(count) for string, count in zip(strings, counts, strict=True)}

    def merge(self, a: dict[Any, int], b: dict[Any, int]) -> dict[Any, int]:
        """Counts of both."""
        return {key: a.get(key, 0) + b.get(key, 0) for key in a.keys() | b.keys()}

    def _share(self, summary: dict[Any, int], reference: Any) -> np.ndarray:
        share = np.zeros(len(reference["joint"]))
        for string, count in summary.items():
            share[int(np.dot(string, reference["base"]))] = count
        return share / share.sum()

    def compute(self, summary: dict[Any, int], reference: Any) -> dict[str, float]:
        """The distance."""
        return {
            "quality/total_variation": 0.5 * float(np.abs(self._share(summary, reference) - reference["joint"]).sum())
        }

    def influence(self, summary: dict[Any, int], reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row."""
        share = self._share(summary, reference)
        sign = np.sign(share - reference["joint"])
        own = rows["identity"].astype(np.int64) @ reference["base"]
        return {"quality/total_variation": 0.5 * (sign[own] - sign @ share)}
