"""A diffusers DiT of which every row computes the tokens that it needs: the others are as they were last.

What is remembered of a row is its tokens' predictions and the keys and values of every block, for evaluations with
labels and for those without; every tensor has the row axis first.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tasks import dit
from tasks.layer_skip import multiply_adds

PARTS = 4  # how many sizes there are of what a row computes: rows of one size are one call of the network

Memory = dict[str, Any]


def sized(urgency: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens each row computes: all whose urgency is infinite, and the next ones up to a multiple of a quarter.

    Args:
        urgency: of every token, (B, T); infinite where it must be computed.

    Returns:
        how many tokens each row computes, (B,) int64, and all tokens in the order of urgency, (B, T) int64.
    """
    part = -(-urgency.shape[1] // PARTS)
    needed = urgency.isinf().sum(dim=1)
    count = (-(-needed // part) * part).clamp(part, urgency.shape[1])
    return count, urgency.argsort(dim=1, descending=True, stable=True)


class Pruned:
    """The network for some rows, in the place of the network itself.

    Args:
        network: a DiTTransformer2DModel.
        memory: what all rows remember, by kind of evaluation; it is left as it is.
        num_rows: B.
        rows: the rows of a call, (b,) int64.
        active: the tokens that these compute, (b, K) int64; None for all.

    Attributes:
        memory: the same after the calls.
    """

    def __init__(self, network: Any, memory: Memory, num_rows: int, rows: Tensor, active: Tensor | None) -> None:
        self._network, self._size, self._rows, self._active = network, num_rows, rows, active
        self.memory = dict(memory)

    def __call__(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        """The prediction, (b, C, H, W), where a diffusers network has it."""
        time, labels = timestep, class_labels
        network, rows, active = self._network, self._rows, self._active
        labelled = bool((labels != network.config.num_embeds_ada_norm).any())
        kind = "conditional" if labelled else "unconditional"
        before = self.memory.get(kind)
        cache: dit.Cache | None = None
        if active is not None and before is not None:
            cache = [(key[rows], value[rows]) for key, value in before["cache"]]
        found, fresh = dit.tokens(network, x, time, labels, active, cache)
        if active is not None and before is not None:
            found = dit.put(before["patches"][rows], active, found)
        if before is None:
            empty = lambda part: part.new_zeros(self._size, *part.shape[1:])  # noqa: E731
            before = {"patches": empty(found), "cache": tuple((empty(k), empty(v)) for k, v in fresh)}
        pairs = zip(before["cache"], fresh, strict=True)
        put = lambda whole, part: whole.index_copy(0, rows, part)  # noqa: E731
        self.memory[kind] = {
            "patches": put(before["patches"], found),
            "cache": tuple((put(k, key), put(v, value)) for (k, v), (key, value) in pairs),
        }
        image = dit.image(network, found)
        return SimpleNamespace(sample=image) if return_dict else (image,)


@lru_cache(maxsize=64)
def share(skeleton: Any, count: int) -> float:
    """What an evaluation of so many tokens costs, in units of the whole network's multiply-adds.

    Args:
        skeleton: a DiTTransformer2DModel on the meta device.
        count: K.
    """
    size, patch = skeleton.config.sample_size, skeleton.config.patch_size
    num_tokens = (size // patch) ** 2
    if count == num_tokens:
        return 1.0
    with torch.device("meta"):
        x, one = torch.zeros(1, skeleton.config.in_channels, size, size), torch.zeros(1, dtype=torch.int64)
        inputs = (skeleton, x, torch.zeros(1), one)
        with torch.no_grad():
            _, cache = dit.tokens(*inputs, None, None)
        active = torch.zeros(1, count, dtype=torch.int64)
        return multiply_adds(dit.tokens, *inputs, active, cache) / multiply_adds(dit.tokens, *inputs, None, None)
