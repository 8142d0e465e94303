"""Mean of a reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.moments import Moments
from tasks.registry import Spec, metrics, rewards
from tasks.types import Rows


@metrics.register("mean_reward")
@dataclass(frozen=True)
class MeanReward:
    """Mean over the samples of a reward.

    Where a strategy selects by one reward, report another beside it: the one that was selected for always rises.

    Args:
        reward: name of the reward, or its whole spec, ``{name: measurement, operator: blur}``.

    Reference: none needed.
    """

    reward: str | dict[str, Any] = "class_log_prob"

    @property
    def _name(self) -> str:
        return self.reward if isinstance(self.reward, str) else rewards.complete(self.reward)["name"]

    @property
    def better(self) -> dict[str, str]:
        """Larger rewards are better."""
        return {f"reward/{self._name}": "higher"}

    def needs(self) -> tuple[Spec, ...]:
        """The reward's column."""
        return (rewards.complete(self.reward),)

    def check(self, model: Any, num_samples: int) -> None:
        """Any number."""

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> None:
        """None needed."""

    def summarize(self, rows: Rows) -> Moments:
        """Count and mean."""
        return Moments.of(rows[self._name][:, None])

    def merge(self, a: Moments, b: Moments) -> Moments:
        """Of both."""
        return a.merge(b)

    def compute(self, summary: Moments, reference: Any) -> dict[str, float]:
        """The mean."""
        return {f"reward/{self._name}": float(summary.mean[0])}

    def influence(self, summary: Moments, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """Deviation from the mean."""
        return {f"reward/{self._name}": rows[self._name].astype(np.float64) - summary.mean[0]}
