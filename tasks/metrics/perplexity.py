"""Generative perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics, rewards
from tasks.tokens import alphabet, refuse_other_alphabet
from tasks.types import Rows


@metrics.register("perplexity")
@dataclass(frozen=True)
class Perplexity:
    """Generative perplexity ``exp(-mean log p(x) / L)`` of the samples under a law that can be written down.

    Low is not good by itself: a sampler at low temperature repeats the likeliest strings and has a lower perplexity
    than the data. So every study that asks for it measures ``token_entropy`` too, and no search may have it as its only
    quality.

    Args:
        model: spec of the token model whose law judges: ``{name: digits_tokens}`` for its autoregressive model,
            ``{name: table, ...}`` for the exact joint.
        conditional: judge by p(x | label); null does so where that model has labels.

    Reference: Lou et al. 2024, "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", section
        5; Zheng et al. 2025, "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate
        Categorical Sampling" (why entropy must be shown beside it).
    """

    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits_tokens"})
    conditional: bool | None = None

    better = {"quality/perplexity": "lower"}
    beside = ("token_entropy",)
    gamed = {"quality/perplexity": "quality/token_entropy"}

    @property
    def _scorer(self) -> Spec:
        return rewards.complete({"name": "token_log_prob", "model": self.model, "conditional": self.conditional})

    def needs(self) -> tuple[Spec, ...]:
        """The log-probabilities."""
        return (self._scorer,)

    def check(self, model: Any, num_samples: int) -> None:
        """Samples that the law knows."""
        refuse_other_alphabet(model, rewards.build(self._scorer).judge, "metric perplexity")

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Tokens of a sample."""
        return {"length": np.array(alphabet(rewards.build(self._scorer).judge)[1])}

    def summarize(self, rows: Rows) -> Moments:
        """Count and mean."""
        return Moments.of(rows["token_log_prob"][:, None])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The perplexity."""
        return {"quality/perplexity": math.exp(-float(summary.mean[0]) / float(reference["length"]))}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row."""
        value = self.compute(summary, reference)["quality/perplexity"]
        spread = rows["token_log_prob"].astype(np.float64) - summary.mean[0]
        return {"quality/perplexity": -value / float(reference["length"]) * spread}
