"""The digit classifier's penultimate layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks import classifier
from tasks.registry import features


@features.register("classifier")
@dataclass(frozen=True)
class ClassifierFeatures:
    """The 64 penultimate activations of the embedded digit classifier.

    Reference: Heusel et al. 2017 use an Inception network's in the same place.
    Cost: one small network.
    """

    needs_labels = False

    @property
    def revision(self) -> str:
        """Hash of the classifier."""
        return classifier.revision()

    def check(self, shape: tuple[int, ...]) -> None:
        """8x8 grey images only."""
        classifier.refuse_other_shapes(shape, "features classifier")

    def dim(self, shape: tuple[int, ...]) -> int:
        """64."""
        return classifier.FEATURES

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, 64)."""
        with torch.no_grad():
            return classifier.load(str(samples.device)).features(samples.float())
