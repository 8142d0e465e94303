"""The small digit classifier that rewards and features share."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.checkpoint import WEIGHTS

FEATURES = 64
PATH = WEIGHTS / "digits_classifier"


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers on 8x8 grey images in [-1, 1]; the penultimate layer has 64 units."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 64)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> logits (B, 10)."""
        return self.head(self.body(images))


@lru_cache(maxsize=4)
def load(device: str) -> DigitClassifier:
    """The classifier that comes with Solvus, in evaluation mode."""
    from safetensors.torch import load_file

    net = DigitClassifier()
    net.load_state_dict(load_file(PATH / "model.safetensors"))
    return net.eval().requires_grad_(False).to(device)


@lru_cache(maxsize=1)
def revision() -> str:
    """Hash of its weights: a retrained classifier is another measure."""
    return hashlib.sha256(Path(PATH / "model.safetensors").read_bytes()).hexdigest()[:16]


def refuse_other_shapes(shape: tuple[int, ...], name: str) -> None:
    """The classifier knows 8x8 grey images only."""
    if tuple(shape) != (1, 8, 8):
        raise ValueError(f"{name} reads 8x8 grey images (1, 8, 8), but the model makes {tuple(shape)}.")


def classify(samples: Tensor) -> Tensor:
    """Log-probabilities of the ten digits, (B, 10)."""
    return torch.log_softmax(load(str(samples.device))(samples.float()), dim=-1)
