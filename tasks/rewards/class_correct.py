"""Whether the classifier sees the asked digit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks import classifier
from tasks.registry import rewards


@rewards.register("class_correct")
@dataclass(frozen=True)
class ClassCorrect:
    """1 where the embedded classifier's most likely class is the one that the row asked for, else 0.

    Reference: Ravuri and Vinyals 2019, classification accuracy of generated samples.
    Cost: one small network.
    """

    needs_labels = True

    @property
    def revision(self) -> str:
        """Hash of the classifier."""
        return classifier.revision()

    def check(self, shape: tuple[int, ...]) -> None:
        """8x8 grey images only."""
        classifier.refuse_other_shapes(shape, "class_correct")

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) of 0 and 1."""
        assert cond is not None
        return (classifier.classify(samples).argmax(-1) == cond).float()
