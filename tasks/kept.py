"""The first rows of a trial, for metrics that compare rows with each other and so cannot fold them into sums."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tasks.once import Once


@dataclass(frozen=True)
class Kept:
    """Features (n, D) float64 of the first rows in index order, at most ``limit``: bounded memory, associative merging.

    Attributes:
        count: rows seen, kept or not.
        features: those that are kept.
        limit: most rows that are kept.
    """

    count: int
    features: np.ndarray
    limit: int
    once: Once = field(default_factory=Once, compare=False, repr=False)

    @classmethod
    def of(cls, features: np.ndarray, limit: int) -> Kept:
        """Of (B, D) features."""
        return cls(len(features), features[:limit].astype(np.float64), limit)

    def merge(self, other: Kept) -> Kept:
        """The first rows of both, in order."""
        room = max(self.limit - len(self.features), 0)
        joined = np.concatenate([self.features, other.features[:room]])
        return Kept(self.count + other.count, joined, self.limit)

    def spread(self, effects: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Effects of the kept rows at some positions, (B,); NaN for the rows that are not used."""
        found = np.full(len(position), np.nan)
        used = position < len(self.features)
        found[used] = effects[position[used]]
        return found


def check_limit(limit: int, num_samples: int, least: int, metric: str) -> None:
    """Refuse fewer kept rows than a metric needs."""
    if limit < least:
        raise ValueError(f"metric.max_samples must be at least {least}, got {limit}.")
    if num_samples < least:
        raise ValueError(f"{metric} needs at least {least} rows, got num_samples={num_samples}.")
