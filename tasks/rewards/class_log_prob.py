"""Log-probability of the asked digit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tasks import classifier
from tasks.registry import rewards


@rewards.register("class_log_prob")
@dataclass(frozen=True)
class ClassLogProb:
    """The embedded classifier's log-probability of the class that the row asked for, at most 0.

    Reference: classifier reward; Dhariwal and Nichol 2021 use the same quantity as guidance.
    Cost: one small network.
    """

    needs_labels = True
    differentiable = True
    passing = math.log(0.5)  # from here on the classifier sees the asked class for certain

    @property
    def revision(self) -> str:
        """Hash of the classifier."""
        return classifier.revision()

    def check(self, shape: tuple[int, ...]) -> None:
        """8x8 grey images only."""
        classifier.refuse_other_shapes(shape, "class_log_prob")

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,)."""
        assert cond is not None
        return classifier.classify(samples).gather(1, cond[:, None])[:, 0]
