"""The small network of one-more-step sampling."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tasks.checkpoint import WEIGHTS

FILE = "model.safetensors"


class SideNetwork(nn.Module):
    """Noise and label -> velocity at zero signal, (B, 1, 8, 8): two layers of 64 and 32 units, 4,736 numbers."""

    def __init__(self, size: int = 64, width: int = 32, num_labels: int = 11) -> None:
        super().__init__()
        self.label = nn.Embedding(num_labels, width)
        self.into = nn.Linear(size, width)
        self.out = nn.Linear(width, size)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, 1, 8, 8) float32."""
        hidden = nn.functional.silu(self.into(x.flatten(1).float()) + self.label(labels))
        return self.out(hidden).view_as(x)


def weights_of(path: str | None) -> Path:
    """The file of the weights.

    Raises:
        ValueError: it is not there.
    """
    found = (Path(path) if path else WEIGHTS / "digits_one_more_step") / FILE
    if not found.is_file():
        raise ValueError(
            f"{found.parent} has no {FILE}. Give a folder made by `solvus train digits_one_more_step --out DIR`."
        )
    return found


def load(path: str | None, device: torch.device) -> SideNetwork:
    """The network with its weights."""
    from safetensors.torch import load_file

    net = SideNetwork()
    net.load_state_dict(load_file(weights_of(path)))
    return net.eval().requires_grad_(False).to(device)
