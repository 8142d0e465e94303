"""The digit classifier's logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks import classifier
from tasks.registry import features


@features.register("classifier_logits")
@dataclass(frozen=True)
class ClassifierLogits:
    """The ten log-probabilities of the embedded digit classifier, for scores of its classes.

    Reference: Salimans et al. 2016 use an Inception network's in the same place.
    Cost: one small network.
    """

    needs_labels = False

    @property
    def revision(self) -> str:
        """Hash of the classifier."""
        return classifier.revision()

    def check(self, shape: tuple[int, ...]) -> None:
        """8x8 grey images only."""
        classifier.refuse_other_shapes(shape, "features classifier_logits")

    def dim(self, shape: tuple[int, ...]) -> int:
        """10."""
        return 10

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, 10)."""
        return classifier.classify(samples).detach()
