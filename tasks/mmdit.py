"""Stable Diffusion 3's transformer run on some of its image tokens, with the keys and values of the others from before.

Text tokens are always computed. Blocks run as they are: only their attention is answered by a processor that puts the
active tokens' keys and values among those of earlier evaluations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tasks.dit import Cache, pick, put


class _Remembering:
    """Attention of the active image tokens (and the text) to all of them.

    Attributes:
        active: tokens that are computed, (B, K) int64; None for all.
        held: keys and values of all image tokens, (B, T, D) each; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.active: Tensor | None = None
        self.held: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: None
    ) -> Any:
        """The layer's outputs for the active tokens and, where text was given, for the text."""
        key, value = attention.to_k(hidden_states), attention.to_v(hidden_states)
        if self.active is not None:
            assert self.held is not None
            key, value = put(self.held[0], self.active, key), put(self.held[1], self.active, value)
        self.held = key, value
        parts = [_heads(attention, y) for y in (attention.to_q(hidden_states), key, value)]
        parts[:2] = _normed(parts[:2], attention.norm_q, attention.norm_k)
        text = encoder_hidden_states
        if text is not None:
            layers = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
            added = [_heads(attention, layer(text)) for layer in layers]
            added[:2] = _normed(added[:2], attention.norm_added_q, attention.norm_added_k)
            parts = [torch.cat(pair, dim=2) for pair in zip(parts, added, strict=True)]
        query, key, value = parts
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        count = hidden_states.shape[1]
        found = attention.to_out[1](attention.to_out[0](mixed[:, :count]))
        if text is None:
            return found
        rest = mixed[:, count:]
        return found, rest if attention.context_pre_only else attention.to_add_out(rest)


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _normed(pair: list[Tensor], *norms: Any) -> list[Tensor]:
    return [x if norm is None else norm(x) for x, norm in zip(pair, norms, strict=True)]


def _attentions(network: Any) -> list[Any]:
    """The attentions over image tokens, in a fixed order, each with a processor that remembers."""
    found = []
    for block in network.transformer_blocks:
        found += [layer for layer in (block.attn, getattr(block, "attn2", None)) if layer is not None]
    for layer in found:
        if not isinstance(layer.processor, _Remembering):
            layer.set_processor(_Remembering())
    return found


def tokens(
    network: Any, x: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor, active: Tensor | None, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """What the network predicts for some image tokens. Replaces the processors of its attentions: give it a twin.

    Args:
        network: an SD3Transformer2DModel.
        x: states, (B, C, H, W).
        time: training steps, (B,).
        embeds: states of the text, (B, L, D).
        pooled: pooled text, (B, P).
        active: tokens that are computed, (B, K) int64; None computes all, which is the network itself.
        cache: keys and values of the last evaluation; needed where some tokens are left out.

    Returns:
        the predictions of the active tokens, (B, K, patch * patch * C), and the new cache.
    """
    layers = _attentions(network)
    for i, layer in enumerate(layers):
        layer.processor.active, layer.processor.held = active, None if cache is None else cache[i]
    hidden, text = pick(network.pos_embed(x), active), network.context_embedder(embeds)
    embedded = network.time_text_embed(time, pooled)
    for block in network.transformer_blocks:
        text, hidden = block(hidden, text, embedded)
    return network.proj_out(network.norm_out(hidden, embedded)), [layer.processor.held for layer in layers]


def image(network: Any, patches: Tensor, height: int, width: int) -> Tensor:
    """Predictions of all tokens, (B, T, patch * patch * C), as a state, (B, C, height, width)."""
    size = network.config.patch_size
    grid = patches.unflatten(2, (size, size, -1)).unflatten(1, (height // size, width // size))  # (B, h, w, p, q, C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
