"""Inception score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.parts import part_of
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAME = "quality/inception_score"


@dataclass(frozen=True)
class _Sums:
    count: np.ndarray  # (S,)
    probability: np.ndarray  # (S, C), sum of p
    negentropy: np.ndarray  # (S,), sum of sum_c p_c log p_c


@metrics.register("inception_score")
@dataclass(frozen=True)
class InceptionScore:
    """``exp(E KL(p(y|x) || p(y)))`` of a classifier: sure about every sample, and unsure about their mixture.

    The mean over ``splits`` parts, to which rows belong as if drawn. Every part's p(y) is its own, so the score is
    biased downwards at few samples a part; compare at equal numbers only. It knows nothing of the data: samples that
    are one perfect image a class score best. Classes are ImageNet's with ``inception_v3_logits``, whose published
    scores use ten splits.

    Args:
        features: name of an extractor of class logits, or its whole spec.
        splits: parts.

    Reference: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
    """

    features: str | dict[str, Any] = "classifier_logits"
    splits: int = 10

    better = {NAME: "higher"}

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"metric.splits must be at least 1, got {self.splits}.")

    def needs(self) -> tuple[Spec, ...]:
        """The logits."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """Ten rows a part, so that none is empty."""
        if num_samples < 10 * self.splits:
            raise ValueError(
                f"inception_score needs ten rows for each of {self.splits} splits, got num_samples={num_samples}. "
                "Raise it, or set fewer splits."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> _Sums:
        """Sums of these rows, by part."""
        log_p, part = _log_softmax(rows[column(self.features)]), part_of(rows["position"], self.splits)
        p = np.exp(log_p)
        probability = np.zeros((self.splits, p.shape[1]))
        np.add.at(probability, part, p)
        negentropy = np.bincount(part, (p * log_p).sum(axis=1), minlength=self.splits)
        return _Sums(np.bincount(part, minlength=self.splits), probability, negentropy)

    def merge(self, a: _Sums, b: _Sums) -> _Sums:
        """Of both."""
        return _Sums(a.count + b.count, a.probability + b.probability, a.negentropy + b.negentropy)

    def compute(self, summary: _Sums, reference: Any) -> dict[str, float]:
        """The mean over the parts that have rows."""
        return {NAME: float(np.exp(_divergences(summary)[summary.count > 0]).mean())}

    def influence(self, summary: _Sums, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """``n / (S n_s) IS_s (KL(p_i || p(y)) - mean KL)`` of a row in part s."""
        log_p, part = _log_softmax(rows[column(self.features)]), part_of(rows["position"], self.splits)
        mean, found = _mean_log(summary), _divergences(summary)
        p = np.exp(log_p)
        own = (p * np.where(p > 0, log_p - mean[part], 0.0)).sum(axis=1)
        share = summary.count.sum() / ((summary.count > 0).sum() * summary.count[part])
        return {NAME: share * np.exp(found[part]) * (own - found[part])}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _mean_log(summary: _Sums) -> np.ndarray:
    mean = summary.probability / np.maximum(summary.count, 1)[:, None]
    return np.log(np.where(mean > 0, mean, 1.0))  # a class that no row may have adds nothing


def _divergences(summary: _Sums) -> np.ndarray:
    mean = summary.probability / np.maximum(summary.count, 1)[:, None]
    return summary.negentropy / np.maximum(summary.count, 1) - (mean * _mean_log(summary)).sum(axis=1)
