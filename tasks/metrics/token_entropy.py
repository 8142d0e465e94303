"""Entropy of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.registry import Spec, features, metrics
from tasks.tokens import alphabet
from tasks.types import Rows


@dataclass(frozen=True)
class _Kept:
    count: int
    mean: float  # of the samples' own entropies
    pooled: np.ndarray  # how often each value was met


@metrics.register("token_entropy")
@dataclass(frozen=True)
class TokenEntropy:
    """Entropy in nats of the token values: within one sample, on average, and of all samples pooled.

    ``H = -sum_v p_v log p_v`` over the shares of the values, whatever their order. What belongs beside a perplexity: a
    sampler that repeats itself lowers both. More is better only up to the entropy of the data.

    Reference: Zheng et al. 2025, "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit
        Inaccurate Categorical Sampling" (entropy within a sample).
    """

    better = {"quality/token_entropy": "higher", "quality/corpus_entropy": "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The tokens."""
        return (features.complete("tokens"),)

    def check(self, model: Any, num_samples: int) -> None:
        """A model whose samples are tokens."""
        alphabet(model)

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> _Kept:
        """Entropies, and counts of the values."""
        counts = _counts(rows["tokens"])
        return _Kept(len(counts), float(_entropy(counts).mean()), counts.sum(axis=0))

    def merge(self, a: _Kept, b: _Kept) -> _Kept:
        """Of both."""
        pooled = np.zeros(max(len(a.pooled), len(b.pooled)))
        pooled[: len(a.pooled)] += a.pooled
        pooled[: len(b.pooled)] += b.pooled
        count = a.count + b.count
        return _Kept(count, a.mean + (b.mean - a.mean) * (b.count / count), pooled)

    def compute(self, summary: _Kept, reference: Any) -> dict[str, float]:
        """Both entropies."""
        pooled = float(_entropy(summary.pooled[None])[0])
        return {"quality/token_entropy": summary.mean, "quality/corpus_entropy": pooled}

    def influence(self, summary: _Kept, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row; on the pooled entropy the derivative ``-sum_v (p_v - q_v) log q_v``."""
        counts = _counts(rows["tokens"])
        share = counts / counts.sum(axis=1, keepdims=True)
        pooled = summary.pooled / summary.pooled.sum()
        surprise = -np.log(np.where(pooled > 0, pooled, 1.0))
        return {
            "quality/token_entropy": _entropy(counts) - summary.mean,
            "quality/corpus_entropy": share @ surprise[: share.shape[1]] - pooled @ surprise,
        }


def _counts(tokens: np.ndarray) -> np.ndarray:
    """How often each sample has each value, (B, V) float64; V is one above the largest value here."""
    ids = np.asarray(tokens).astype(np.int64)
    counts = np.zeros((len(ids), int(ids.max()) + 1))
    np.add.at(counts, (np.arange(len(ids))[:, None], ids), 1.0)
    return counts


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Of the shares in each row, (B,) nats."""
    share = counts / counts.sum(axis=1, keepdims=True)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)
