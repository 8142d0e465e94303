"""Share of different n-grams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.registry import Spec, features, metrics
from tasks.tokens import alphabet
from tasks.types import Rows


@dataclass(frozen=True)
class _Grams:
    total: int
    rows: int
    met: dict[bytes, int]  # in how many samples each was met: 1, or 2 for more


@metrics.register("distinct_n")
@dataclass(frozen=True)
class DistinctN:
    """Share of different n-grams among all n-grams of the samples, 1 when none repeats.

    It falls with the number of samples, since there are only so many n-grams: compare at equal numbers only. With few
    token values take n so large that their V^n grams are many more than the samples have. Grams
    follow the order of the tokens; in pictures they run on over the ends of lines.

    Args:
        n: length of the grams.

    Reference: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    """

    n: int = 2

    @property
    def _value(self) -> str:
        return f"quality/distinct_{self.n}"

    @property
    def better(self) -> dict[str, str]:
        """More different ones."""
        return {self._value: "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The tokens."""
        return (features.complete("tokens"),)

    def check(self, model: Any, num_samples: int) -> None:
        """Strings of n tokens at least."""
        length = alphabet(model)[1]
        if not 1 <= self.n <= length:
            raise ValueError(f"metric.n must be between 1 and the {length} tokens of a sample, got {self.n}.")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def _own(self, rows: Rows) -> list[set[bytes]]:
        tokens = np.asarray(rows["tokens"]).astype(np.int32)
        grams = np.lib.stride_tricks.sliding_window_view(tokens, self.n, axis=1)  # (B, L - n + 1, n)
        return [{gram.tobytes() for gram in row} for row in grams]

    def summarize(self, rows: Rows) -> _Grams:
        """Which grams were met, and whether in one sample alone."""
        met: dict[bytes, int] = {}
        own = self._own(rows)
        for grams in own:
            for gram in grams:
                met[gram] = min(met.get(gram, 0) + 1, 2)
        return _Grams(len(own) * (rows["tokens"].shape[1] - self.n + 1), len(own), met)

    def merge(self, a: _Grams, b: _Grams) -> _Grams:
        """Of both."""
        met = dict(a.met)
        for gram, count in b.met.items():
            met[gram] = min(met.get(gram, 0) + count, 2)
        return _Grams(a.total + b.total, a.rows + b.rows, met)

    def compute(self, summary: _Grams, reference: Any) -> dict[str, float]:
        """The share."""
        return {self._value: len(summary.met) / summary.total}

    def influence(self, summary: _Grams, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """What goes when a row is left out: the grams that it alone has, centred, a gram of the row each."""
        alone = np.array([sum(summary.met[gram] == 1 for gram in grams) for grams in self._own(rows)], dtype=np.float64)
        mean = sum(count == 1 for count in summary.met.values()) / summary.rows
        return {self._value: (alone - mean) * (summary.rows / summary.total)}
