"""The transformer over picture tokens that the masked and the autoregressive digit models share, and its folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tasks.checkpoint import file_digest, read_json

SHIFTS = 9  # the pixel shifts of the training pictures, (-1, 0, 1) squared; number 0 is no shift


@dataclass(frozen=True)
class TokenNetworkConfig:
    """Sizes of a network.

    Args:
        vocabulary: number of real tokens V; the input knows one more, the mask or the start of the text.
        height, width: the raster; the length is their product.
        num_classes: labels; the network knows one more, "no label".
        dim, depth, heads: of the transformer.
        dropout: in training.
        causal: each position sees the positions before it alone, and predicts its own token.
    """

    vocabulary: int = 17
    height: int = 8
    width: int = 8
    num_classes: int = 10
    dim: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    causal: bool = False

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.height * self.width


class _Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: TokenNetworkConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout = config.heads, config.dropout
        self.norm_attention, self.norm_forward = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix, self.join = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        # Preference of every head for every offset. It begins as "the nearer the better", each head with another reach:
        # without it the network needs thousands of steps to find that neighbours matter.
        dy, dx = torch.arange(1 - config.height, config.height), torch.arange(1 - config.width, config.width)
        reach = 2.0 ** -torch.arange(config.heads)
        self.near = nn.Parameter(-(reach[:, None, None] * torch.hypot(dy[:, None].float(), dx.float())).flatten(1))

    def forward(self, h: Tensor, offsets: Tensor, hidden: Tensor | None) -> Tensor:
        batch, length, dim = h.shape
        q, k, v = self.mix(self.norm_attention(h)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.near[:, offsets]  # (heads, L, L)
        bias = bias if hidden is None else bias.masked_fill(hidden, -torch.inf)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, L, dim / heads)
        h = h + self._drop(self.join(seen.transpose(1, 2).reshape(batch, length, dim)))
        return h + self._drop(self.narrow(functional.gelu(self.widen(self.norm_forward(h)))))

    def _drop(self, h: Tensor) -> Tensor:
        return functional.dropout(h, self.dropout, self.training)


class TokenNetwork(nn.Module):
    """Logits of every token of a picture from the others (or, when causal, from those before it).

    A token enters by a learned embedding and by cosines of its grey level, so that near levels begin alike; its place
    by learned embeddings of row and column. The label, and in training the shift of the picture, are added everywhere.
    There is no time: the posterior of a masked token given the visible ones does not depend on it.

    Reference: Ou et al. 2024, "Your Absorbing Discrete Diffusion Secretly Models the Conditional Distributions of Clean
        Data", theorem 1 (no time); Karras et al. 2022, appendix F.2 (telling the network how its data were changed).
    """

    levels: Tensor
    offsets: Tensor

    def __init__(self, config: TokenNetworkConfig) -> None:
        super().__init__()
        self.config = config
        grey = torch.arange(config.vocabulary) / (config.vocabulary - 1)
        waves = torch.cos(torch.pi * torch.arange(1, 9) * grey[:, None])  # (V, 8)
        self.register_buffer("levels", torch.cat([waves, torch.zeros(1, 8)]), persistent=False)
        y, x = torch.arange(config.length) // config.width, torch.arange(config.length) % config.width
        down, right = y[:, None] - y + config.height - 1, x[:, None] - x + config.width - 1
        self.register_buffer("offsets", down * (2 * config.width - 1) + right, persistent=False)
        self.token = nn.Embedding(config.vocabulary + 1, config.dim)
        self.level = nn.Linear(8, config.dim, bias=False)
        self.row, self.column = nn.Embedding(config.height, config.dim), nn.Embedding(config.width, config.dim)
        self.label = nn.Embedding(config.num_classes + 1, config.dim)
        self.shift = nn.Embedding(SHIFTS, config.dim)
        layers = [_Block(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocabulary)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and not name.endswith("near"):
                nn.init.normal_(weight, std=0.02 if name != "level.weight" else 0.1)
        for block in layers:
            for last in (block.join, block.narrow):
                nn.init.normal_(last.weight, std=0.02 / (2 * config.depth) ** 0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, label: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, L) int64 tokens and (B,) int64 labels -> (B, L, V) float32 logits."""
        config = self.config
        if config.causal:
            start = torch.full_like(tokens[:, :1], config.vocabulary)
            tokens = torch.cat([start, tokens[:, :-1]], dim=1)
        place = (self.row.weight[:, None] + self.column.weight).view(config.length, -1)
        whole = self.label(label) + self.shift(torch.zeros_like(label) if shift is None else shift)
        h = self.token(tokens) + self.level(self.levels[tokens]) + place + whole[:, None]
        hidden = torch.ones_like(self.offsets, dtype=torch.bool).triu(1) if config.causal else None
        for block in self.blocks:
            h = block(h, self.offsets, hidden)
        return self.head(self.norm(h))


def save(network: TokenNetwork, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, in half precision: it halves the file and is read as float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(network.config), indent=1) + "\n")
    save_file({name: value.half() for name, value in network.state_dict().items()}, folder / "model.safetensors")


@lru_cache(maxsize=16)
def _read_config(path: Path, size: int, mtime_ns: int) -> TokenNetworkConfig:
    data = read_json(path, "the configuration of a token network")
    try:
        return TokenNetworkConfig(**data)
    except TypeError as error:
        raise ValueError(
            f"{path} is not the configuration of a token network: {error}. Train the model again."
        ) from None


def read_config(folder: Path) -> TokenNetworkConfig:
    """The sizes that a folder's network has.

    Raises:
        ValueError: the folder holds no such network.
    """
    if not folder.is_dir():
        raise ValueError(f"model.path {str(folder)!r} is not a folder. Give one made by solvus train.")
    path = folder / "config.json"
    stat = path.stat() if path.exists() else None
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} has no model.safetensors, so it is no token model. Give one made by solvus train.")
    return _read_config(path, stat.st_size if stat else 0, stat.st_mtime_ns if stat else 0)


def revision(folder: Path) -> str:
    """Hash of weights and sizes, 16 hexadecimal digits."""
    weights = file_digest(folder / "model.safetensors")
    data = json.dumps([weights, asdict(read_config(folder))], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def load(folder: Path, device: str) -> TokenNetwork:
    """The network of a folder in float32 and evaluation mode, kept for later calls.

    Raises:
        ValueError: damaged weights, or weights of other sizes than the configuration's.
    """
    return _load(folder, device, revision(folder))


@lru_cache(maxsize=4)
def _load(folder: Path, device: str, _revision: str) -> TokenNetwork:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = TokenNetwork(read_config(folder))
    weights: dict[str, Any]
    try:
        weights = load_file(folder / "model.safetensors")
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except SafetensorError as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} is damaged: {error}. Copy or train the model again."
        ) from None
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise ValueError(f"the weights in {folder} do not fit its config.json: {first[0].strip()}") from None
    return network.eval().requires_grad_(False).to(device)
