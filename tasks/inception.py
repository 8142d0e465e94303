"""The Inception-v3 network of the Fréchet inception distance: TensorFlow's of 2015-12-05, as ported to PyTorch.

It differs from today's Inception-v3 in three places: average pools do not count padding, the last block takes a
maximum instead of an average, and there are 1008 classes. Layers are named as in the weights that torch-fidelity and
pytorch-fid publish.

Reference: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; Heusel et al. 2017 (FID).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.checkpoint import check_weights, file_digest
from tasks.pictures import check_picture, unit
from tasks.pretrained import fill, home, read_state

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + FILE
SIZE, FEATURES, CLASSES = 299, 2048, 1008


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


class Block(nn.Module):
    """Branches side by side, each a chain of convolutions and pools; a pair at its end forks it once more."""

    def __init__(self, branches: list[list[Any]], convolutions: dict[str, tuple]) -> None:
        super().__init__()
        self.branches = branches
        for name, settings in convolutions.items():
            self.add_module(name, Conv(*settings))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> branches joined along the channels."""
        return torch.cat([self._follow(branch, x) for branch in self.branches], dim=1)

    def _follow(self, branch: list[Any], x: Tensor) -> Tensor:
        for name in branch:
            if isinstance(name, tuple):
                x = torch.cat([self._modules[fork](x) for fork in name], dim=1)  # type: ignore[misc]
            else:
                x = POOLS[name](x) if name in POOLS else self._modules[name](x)  # type: ignore[misc]
        return x


ROW, COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))


def _a(inputs: int, pool: int) -> Block:
    branches: list[list[Any]] = [
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        ["average", "branch_pool"],
    ]
    return Block(branches, {
        "branch1x1": (inputs, 64, 1),
        "branch5x5_1": (inputs, 48, 1), "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (inputs, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (inputs, pool, 1),
    })  # fmt: skip


def _b(inputs: int) -> Block:
    branches: list[list[Any]] = [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], ["halve"]]
    return Block(branches, {
        "branch3x3": (inputs, 384, 3, 2),
        "branch3x3dbl_1": (inputs, 64, 1), "branch3x3dbl_2": (64, 96, 3, 1, 1), "branch3x3dbl_3": (96, 96, 3, 2),
    })  # fmt: skip


def _c(inputs: int, middle: int) -> Block:
    double = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    branches: list[list[Any]] = [
        ["branch1x1"], ["branch7x7_1", "branch7x7_2", "branch7x7_3"], double, ["average", "branch_pool"],
    ]  # fmt: skip
    return Block(branches, {
        "branch1x1": (inputs, 192, 1),
        "branch7x7_1": (inputs, middle, 1), "branch7x7_2": (middle, middle, *ROW),
        "branch7x7_3": (middle, 192, *COLUMN),
        "branch7x7dbl_1": (inputs, middle, 1), "branch7x7dbl_2": (middle, middle, *COLUMN),
        "branch7x7dbl_3": (middle, middle, *ROW), "branch7x7dbl_4": (middle, middle, *COLUMN),
        "branch7x7dbl_5": (middle, 192, *ROW),
        "branch_pool": (inputs, 192, 1),
    })  # fmt: skip


def _d(inputs: int) -> Block:
    branches: list[list[Any]] = [
        ["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)], ["halve"],
    ]  # fmt: skip
    return Block(branches, {
        "branch3x3_1": (inputs, 192, 1), "branch3x3_2": (192, 320, 3, 2),
        "branch7x7x3_1": (inputs, 192, 1), "branch7x7x3_2": (192, 192, *ROW), "branch7x7x3_3": (192, 192, *COLUMN),
        "branch7x7x3_4": (192, 192, 3, 2),
    })  # fmt: skip


def _e(inputs: int, pool: str) -> Block:
    wide, tall = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    branches: list[list[Any]] = [
        ["branch1x1"],
        ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
        ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
        [pool, "branch_pool"],
    ]
    return Block(branches, {
        "branch1x1": (inputs, 320, 1),
        "branch3x3_1": (inputs, 384, 1), "branch3x3_2a": (384, 384, *wide), "branch3x3_2b": (384, 384, *tall),
        "branch3x3dbl_1": (inputs, 448, 1), "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": (384, 384, *wide), "branch3x3dbl_3b": (384, 384, *tall),
        "branch_pool": (inputs, 192, 1),
    })  # fmt: skip


class Inception(nn.Module):
    """The whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _b(288), _c(768, 128), _c(768, 160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = _c(768, 160), _c(768, 192), _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299), levels of 0 to 255 less 128 over 128 -> (B, 2048)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(POOLS["halve"](x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """(B, 1008), without the bias: what published inception scores use."""
        return self.features(x) @ self.fc.weight.T


def resized(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] -> (B, 3, 299, 299): rounded to 8 bits, then bilinear as TensorFlow 1 did it.

    Output pixel i reads the input at ``i * size / 299``, without half a pixel and without a wider filter.
    """
    x = unit(samples, levels=True) * 255
    rows, columns = (_weights(side).to(x) for side in x.shape[-2:])
    return (rows @ x @ columns.T - 128) / 128


@lru_cache(maxsize=8)
def _weights(side: int) -> Tensor:
    place = torch.arange(SIZE, dtype=torch.float64) * (side / SIZE)
    low = place.floor().long().clamp(max=side - 1)
    found = torch.zeros(SIZE, side, dtype=torch.float64)
    index = torch.arange(SIZE)
    found[index, low] += 1 - (place - low)
    found[index, (low + 1).clamp(max=side - 1)] += place - low
    return found


def weights(path: str, sha256: str) -> Path:
    """The file of weights.

    Args:
        path: the file; empty takes ``FILE`` below the folder of weights.
        sha256: how its SHA-256 begins; empty takes any.

    Raises:
        ValueError: no such file, a damaged one, or another one.
    """
    place = Path(path).expanduser() if path else home() / FILE
    if not place.is_file():
        raise ValueError(
            f"features inception_v3 has no weights: {place} is not there. Fetch {URL}, put it there, or set "
            "features.path to the file."
        )
    if not file_digest(place).startswith(sha256):
        raise ValueError(
            f"the SHA-256 of {place} is {file_digest(place)}, but features.sha256 says {sha256}...: these are other "
            "weights, and distances measured with them compare with no published ones. Fetch "
            f"{URL} again, or set features.sha256 to an empty text."
        )
    check_weights(place, f"Fetch {URL} again.")
    return place


@lru_cache(maxsize=2)
def load(path: str, digest: str, device: str) -> Inception:
    """The network in evaluation mode; ``digest`` only says which file it was."""
    with torch.device("meta"):
        network = Inception()
    network = network.to_empty(device="cpu")
    for name, buffer in network.named_buffers():
        buffer.zero_() if name.endswith("num_batches_tracked") else None
    fill(network, read_state(Path(path)), Path(path))
    return network.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class InceptionFeatures:
    """What the extractors that read this network share."""

    path: str = ""
    sha256: str = "6726825d"

    name = ""  # set where a class is registered
    needs_labels = False

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return file_digest(weights(self.path, self.sha256))[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, and the weights at hand."""
        check_picture(shape, f"features {self.name}")
        weights(self.path, self.sha256)

    def network(self, device: str) -> Inception:
        """The network, kept warm."""
        path = weights(self.path, self.sha256)
        return load(str(path), file_digest(path), device)
