"""A diffusers DiT run on some of its tokens, with the keys and values of the others from earlier evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Cache = list[tuple[Tensor, Tensor]]  # keys and values of all tokens, (B, T, D) each, for every block


def tokens(network: Any, x: Tensor, time: Tensor, labels: Tensor, active: Tensor | None, cache: Cache | None) -> Any:
    """What the network predicts for some tokens.

    Args:
        network: a DiTTransformer2DModel.
        x: states, (B, C, H, W).
        time: training steps, (B,).
        labels: (B,) int64.
        active: tokens that are computed, (B, K) int64; None computes all, which is the network itself.
        cache: keys and values of the last evaluation; needed where some tokens are left out.

    Returns:
        the predictions of the active tokens, (B, K, patch * patch * C), and the new cache.
    """
    hidden = pick(network.pos_embed(x), active)
    fresh: Cache = []
    for i, block in enumerate(network.transformer_blocks):
        normed, gate, shift, scale, gate_after = block.norm1(hidden, time, labels, hidden_dtype=hidden.dtype)
        attention = block.attn1
        query, key, value = attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)
        if active is not None:
            assert cache is not None
            key, value = put(cache[i][0], active, key), put(cache[i][1], active, value)
        fresh.append((key, value))
        heads = [y.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for y in (query, key, value)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden = gate[:, None] * attention.to_out[0](mixed) + hidden
        normed = block.norm3(hidden) * (1 + scale[:, None]) + shift[:, None]
        hidden = gate_after[:, None] * block.ff(normed) + hidden
    return project(network, hidden, embedding(network, time, labels, hidden.dtype)), fresh


def embedding(network: Any, time: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The embedding of time and label that the network's last layer is given, (B, D)."""
    return network.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=dtype)


def project(network: Any, hidden: Tensor, embedded: Tensor) -> Tensor:
    """The network's last layer: hidden states, (B, T, D), and their embedding, (B, D), to predictions, (B, T, P)."""
    shift, scale = network.proj_out_1(functional.silu(embedded)).chunk(2, dim=1)
    return network.proj_out_2(network.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])


def image(network: Any, patches: Tensor) -> Tensor:
    """Predictions of all tokens, (B, T, patch * patch * C), as an image, (B, C, H, W)."""
    side, size = int(patches.shape[1] ** 0.5), network.patch_size
    grid = patches.unflatten(2, (size, size, -1)).unflatten(1, (side, side))  # (B, h, w, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patches(network: Any, image: Tensor) -> Tensor:
    """The inverse of :func:`image`."""
    size = network.patch_size
    grid = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, h, p, w, q)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)


def pick(whole: Tensor, active: Tensor | None) -> Tensor:
    """Some tokens, (B, K, D), of all, (B, T, D); all where ``active`` is None."""
    if active is None:
        return whole
    return torch.take_along_dim(whole, active[:, :, None], dim=1)


def put(whole: Tensor, active: Tensor, part: Tensor) -> Tensor:
    """Some tokens replaced: (B, T, D), which of them (B, K), and their values (B, K, D)."""
    return whole.scatter(1, active[:, :, None].expand_as(part), part)
