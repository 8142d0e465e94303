"""A diffusers DiT with an exit after every block: an output head, and a probe that says how wrong the head is.

After block i the hidden states h_i, (B, T, D), of T tokens pass a head g_i, which is the network's own last layer with
weights of its own, and a probe ``u_i = sigmoid(W_i [h_i, e] + b_i)``, where e, (B, D), is the network's embedding of
time and label. The probe estimates ``tanh(|g_i(h_i) - eps|)`` for every predicted number.

Reference: Tang et al. 2023, "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model
Generation" (the timestep-aware uncertainty estimation module).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tasks import dit
from tasks.checkpoint import WEIGHTS, file_digest
from tasks.layer_skip import multiply_adds

FILE = "model.safetensors"


class Exit(nn.Module):
    """The head and the probe after one block.

    Args:
        width: D.
        numbers: predicted numbers of a token, P.
    """

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(width, numbers)
        self.probe = nn.Linear(2 * width, numbers)

    def prediction(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """What the head predicts, (B, T, P), from hidden states (B, T, D) and their embedding (B, D)."""
        shift, scale = self.modulation(nn.functional.silu(embedded)).chunk(2, dim=1)
        return self.out(self.norm(hidden) * (1 + scale[:, None]) + shift[:, None])

    def uncertainty(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The estimated ``tanh(|error|)`` of the head, (B, T, P) in (0, 1)."""
        return torch.sigmoid(self.probe(torch.cat([hidden, embedded[:, None].expand_as(hidden)], dim=2)))


class Exits(nn.ModuleList):
    """The exits of a network, after every block but the last."""

    @classmethod
    def of(cls, network: Any) -> Exits:
        """New ones for a DiTTransformer2DModel; their heads begin as its last layer."""
        found = cls(Exit(network.proj_out_2.in_features, network.proj_out_2.out_features) for _ in _inner(network))
        for each in found:
            each.modulation.load_state_dict(network.proj_out_1.state_dict())  # type: ignore[union-attr]
            each.out.load_state_dict(network.proj_out_2.state_dict())  # type: ignore[union-attr]
        return found


def _inner(network: Any) -> Any:
    return network.transformer_blocks[:-1]


class EarlyExit:
    """A network that each row leaves after the first block whose mean estimated uncertainty is below a threshold.

    Rows that have left are no longer computed. The others share their batches, so what a row's neighbours do changes
    its answer by rounding alone.

    Args:
        network: a DiTTransformer2DModel; whatever is edited in it shows here.
        exits: for it.
        threshold: tau; where no uncertainty is below it, the answer is the network's own, bit for bit.

    Attributes:
        left: of every row since it was cleared, the block after which it left, from 1; (B,) int64 a call.
    """

    def __init__(self, network: Any, exits: Exits, threshold: float) -> None:
        self._network, self._exits, self._threshold = network, exits, threshold
        self.left: list[Tensor] = []

    def __call__(self, x: Tensor, time: Tensor, labels: Tensor) -> Any:
        """The prediction, (B, C, H, W), as ``sample``, which is where a diffusers network has it.

        Args:
            x: states, (B, C, H, W).
            time: training steps, (B,).
            labels: (B,) int64.
        """
        network = self._network
        inside = torch.arange(len(x), device=x.device)
        left = torch.full_like(inside, len(network.transformer_blocks))
        hidden, embedded = network.pos_embed(x), dit.embedding(network, time, labels, x.dtype)
        found: Any = None
        for i, block in enumerate(network.transformer_blocks):
            hidden = block(hidden, timestep=time, class_labels=labels)
            if i == len(self._exits):
                answer, leaves = dit.project(network, hidden, embedded), torch.ones_like(inside, dtype=torch.bool)
            else:
                way_out: Any = self._exits[i]
                leaves = way_out.uncertainty(hidden, embedded).mean(dim=(1, 2)) < self._threshold
                if not leaves.any():
                    continue
                answer = way_out.prediction(hidden[leaves], embedded[leaves])
            if found is None:
                found = answer.new_zeros(len(x), *answer.shape[1:])
            found = found.index_put((inside[leaves],), answer)
            left[inside[leaves]] = i + 1
            if leaves.all():
                break
            inside, hidden, embedded, time, labels = (y[~leaves] for y in (inside, hidden, embedded, time, labels))
        self.left.append(left)
        return SimpleNamespace(sample=dit.image(network, found))


@lru_cache(maxsize=16)
def shares(skeleton: Any) -> tuple[float, ...]:
    """What a row that leaves after block 1, 2, … costs, probes and head included, in units of the whole network.

    Multiply-adds of matrix products, convolutions and attentions, as torch counts them. One that passes all probes and
    leaves after the last block costs more than 1.

    Args:
        skeleton: a DiTTransformer2DModel on the meta device.
    """
    with torch.device("meta"):
        exits, size = Exits.of(skeleton), skeleton.config.sample_size
        x, label = torch.zeros(1, skeleton.config.in_channels, size, size), torch.zeros(1, dtype=torch.int64)
        inputs = (x, torch.zeros(1), label)
        whole = multiply_adds(skeleton, *inputs)
        depths = range(1, len(exits) + 2)
        return tuple(multiply_adds(_leaving, skeleton, exits, depth, *inputs) / whole for depth in depths)


def _leaving(network: Any, exits: Exits, depth: int, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """The work of a row that leaves after a known block."""
    hidden, embedded = network.pos_embed(x), dit.embedding(network, time, labels, x.dtype)
    for block, way_out in zip(network.transformer_blocks[:depth], [*exits, None], strict=False):
        hidden = block(hidden, timestep=time, class_labels=labels)
        if way_out is not None:
            way_out.uncertainty(hidden, embedded)
    if depth > len(exits):
        return dit.project(network, hidden, embedded)
    return exits[depth - 1].prediction(hidden, embedded)  # type: ignore[operator]


def file_of(path: str | None) -> Path:
    """The file with the exits' weights.

    Raises:
        ValueError: it is not there.
    """
    found = (Path(path) if path else WEIGHTS / "digits_dit_probes") / FILE
    if not found.is_file():
        raise ValueError(
            f"{found.parent} has no {FILE}. Give a folder made by `solvus train digits_dit_probes --out DIR`."
        )
    return found


@lru_cache(maxsize=64)
def _trained_on(path: str, digest: str) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("network", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Copy or train the probes again.") from None


def trained_on(path: str | None) -> str:
    """The revision of the network that the exits were trained on."""
    file = file_of(path)
    return _trained_on(str(file), file_digest(file))


def save(exits: Exits, path: Path, network: str) -> None:
    """Write the weights, and beside them the revision of the network that they belong to."""
    from safetensors.torch import save_file

    save_file(exits.state_dict(), path, metadata={"network": network})


def load(path: str | None, network: Any) -> Exits:
    """The exits with their weights, on the device of a network; kept warm between calls of one process."""
    file = file_of(path)
    return _loaded(str(file), file_digest(file), network)


@lru_cache(maxsize=4)
def _loaded(path: str, digest: str, network: Any) -> Exits:
    from safetensors.torch import load_file

    exits = Exits.of(network)
    exits.load_state_dict(load_file(path))
    return exits.eval().requires_grad_(False).to(network.device)
