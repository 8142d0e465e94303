"""Inception-v3's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks import inception
from tasks.inception import InceptionFeatures
from tasks.registry import features


@features.register("inception_v3_logits")
@dataclass(frozen=True)
class InceptionV3Logits(InceptionFeatures):
    """The 1008 class logits of the same Inception-v3 network, without bias, for the inception score.

    Pictures are rounded to 8 bits and resized to 299 pixels as TensorFlow 1 did, so values compare with those that
    torch-fidelity and the original code give. The weights are the user's: a file of torch-fidelity or pytorch-fid.

    Args:
        path: the file of weights; empty looks below $SOLVUS_WEIGHTS.
        sha256: how the file's SHA-256 must begin; empty takes any weights. The whole hash is part of every key.

    Reference: Salimans et al. 2016; Obukhov et al. 2020, torch-fidelity.
    Cost: 5.7 billion multiply-adds a sample.
    """

    def dim(self, shape: tuple[int, ...]) -> int:
        """1008."""
        return inception.CLASSES

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, 1008)."""
        with torch.no_grad():
            return self.network(str(samples.device)).logits(inception.resized(samples))
