"""Coverage: whether one of k samples is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.estimators import pass_at_k
from tasks.registry import Spec, metrics, rewards
from tasks.types import Rows

Counts = dict[int, tuple[int, int]]  # label -> samples, right ones


@metrics.register("pass_at_k")
@dataclass(frozen=True)
class PassAtK:
    """Probability that at least one of k samples of a label is right, averaged over the labels: pass@k, or coverage.

    Unbiased, from all subsets of k of a label's samples. The labels are the questions, and are taken as given: the
    interval is that of the samples, not of other questions that could have been asked. Samples without a label are
    answers to one question.

    Args:
        reward: name or spec of a reward of 0 and 1.
        k: samples of a try.

    Reference: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1; Brown et al. 2024, "Large
        Language Monkeys" (coverage).
    """

    reward: str | dict[str, Any] = "class_correct"
    k: int = 4

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"metric.k must be at least 1, got {self.k}.")

    @property
    def _column(self) -> str:
        return rewards.complete(self.reward)["name"]

    @property
    def _value(self) -> str:
        return f"quality/pass_at_{self.k}"

    @property
    def better(self) -> dict[str, str]:
        """More questions answered."""
        return {self._value: "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The 0/1 column."""
        return (rewards.complete(self.reward),)

    def check(self, model: Any, num_samples: int) -> None:
        """More than k samples of every label."""
        questions = max(model.num_classes, 1)
        if num_samples < questions * (self.k + 1):
            raise ValueError(
                f"pass_at_k tries {self.k} samples of each of {questions} labels and needs one more for the interval: "
                f"num_samples must be {questions * (self.k + 1)} at least, got {num_samples}."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Counts:
        """Samples and right ones of every label.

        Raises:
            ValueError: a reward that is not 0 or 1.
        """
        right, labels = np.asarray(rows[self._column]), np.asarray(rows["label"])
        if not np.isin(right, (0, 1)).all():
            raise ValueError(
                f"pass_at_k needs a reward of 0 and 1, but {self._column} gave {right[~np.isin(right, (0, 1))][0]:g}. "
                "Use class_correct."
            )
        return {int(c): (int((labels == c).sum()), int(right[labels == c].sum())) for c in np.unique(labels)}

    def merge(self, a: Counts, b: Counts) -> Counts:
        """Of both."""
        sums = {c: (a.get(c, (0, 0)), b.get(c, (0, 0))) for c in a.keys() | b.keys()}
        return {c: (one[0] + two[0], one[1] + two[1]) for c, (one, two) in sums.items()}

    def _passed(self, n: int, c: int) -> float:
        return float(pass_at_k(np.array([c]), n, self.k)[0])

    def compute(self, summary: Counts, reference: Any) -> dict[str, float]:
        """The mean over labels."""
        return {self._value: float(np.mean([self._passed(*summary[c]) for c in sorted(summary)]))}

    def influence(self, summary: Counts, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """What changes when a row is left out, exactly: the mean over a label's rows is 0, as of any U-statistic."""
        total = sum(n for n, _ in summary.values())
        moved = {}
        for label, (n, c) in summary.items():
            for right in [0] * (c < n) + [1] * (c > 0):
                change = self._passed(n, c) - self._passed(n - 1, c - right)
                moved[label, right] = (total - 1) * change / len(summary)
        keys = zip(np.asarray(rows["label"]).tolist(), np.asarray(rows[self._column]).tolist(), strict=True)
        return {self._value: np.array([moved[int(label), int(right)] for label, right in keys])}
