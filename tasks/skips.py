"""The skip connections of a UNet, and running it with some of them scaled.

Reference: Ma et al. 2024, "The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

NAME = "res_hidden_states_tuple"  # what diffusers calls the skips that a rising block is given


def skips_of(network: nn.Module) -> tuple[int, ...]:
    """How many skip connections each rising block of a diffusers UNet takes, in the order in which it runs them.

    The first skip of the first block is the deepest. Empty where the network is no such UNet.
    """
    return tuple(len(block.resnets) for block in getattr(network, "up_blocks", ()))


@contextmanager
def scaled_skips(network: Any, scales: Sequence[float]) -> Iterator[None]:
    """Within, skip connection i, from the deepest on, is multiplied by ``scales[i]`` before its concatenation.

    A scale of 1 touches nothing, so the network's answer is the same bit for bit. Only one thread may call the network
    meanwhile; a worker does so.
    """
    with ExitStack() as stack:
        first = 0
        for block, count in zip(network.up_blocks, skips_of(network), strict=True):
            mine, first = tuple(scales[first : first + count]), first + count
            if any(scale != 1.0 for scale in mine):
                hook = block.register_forward_pre_hook(_scaling(mine), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _scaling(scales: tuple[float, ...]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def scaled(skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # A block takes its skips from the end, the deepest first.
        pairs = zip(skips, reversed(scales), strict=True)
        return tuple(skip if scale == 1.0 else skip * scale for skip, scale in pairs)

    def change(block: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if NAME in options:
            return args, options | {NAME: scaled(options[NAME])}
        return (args[0], scaled(args[1]), *args[2:]), options

    return change
