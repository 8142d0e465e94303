"""Inception-v3's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks import inception
from tasks.checkpoint import file_digest
from tasks.pictures import check_picture
from tasks.registry import features


@features.register("inception_v3_logits")
@dataclass(frozen=True)
class InceptionV3Logits:
    """The 1008 class logits of the same Inception-v3 network, without bias, for the inception score.

    Pictures are rounded to 8 bits and resized to 299 pixels as TensorFlow 1 did, so values compare with those that
    torch-fidelity and the original code give. The weights are the user's: a file of torch-fidelity or pytorch-fid.

    Args:
        path: the file of weights; empty looks below $SOLVUS_WEIGHTS.
        sha256: how the file's SHA-256 must begin; empty takes any weights. The whole hash is part of every key.

    Reference: Salimans et al. 2016; Obukhov et al. 2020, torch-fidelity.
    Cost: 5.7 billion multiply-adds a sample.
    """

    path: str = ""
    sha256: str = "6726825d"

    needs_labels = False

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return file_digest(inception.weights(self.path, self.sha256))[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, and the weights at hand."""
        check_picture(shape, "features inception_v3_logits")
        inception.weights(self.path, self.sha256)

    def dim(self, shape: tuple[int, ...]) -> int:
        """1008."""
        return inception.CLASSES

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B, 1008)."""
        path = inception.weights(self.path, self.sha256)
        with torch.no_grad():
            network = inception.load(str(path), file_digest(path), str(samples.device))
            return network.logits(inception.resized(samples))
