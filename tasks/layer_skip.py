"""Networks with some of their blocks left out, as a step of a schedule may ask for.

A block can be left out where its network is residual: what remains is the path around it.

* transformer blocks (torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``, diffusers'
  ``BasicTransformerBlock``), and any module of your own with ``skippable = True``, become the identity;
* an attention with a residual connection (diffusers' ``Attention`` inside a UNet) becomes the identity;
* of a diffusers ``ResnetBlock2D`` the residual branch is left out and the shortcut kept. Where the block changes the
  number of channels, as every block of a UNet's rising half does because it takes a skip-concatenation, that shortcut
  is its 1x1 convolution; elsewhere it is the identity;
* blocks that change the resolution, and blocks inside of another such block, always stay.

Bit b of a mask leaves out block b, and blocks are numbered in the order in which the network runs them.

Reference: Li et al. 2023, "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
Diffusion Model Acceleration", section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks.schedule import MAX_BLOCKS


def _shortcut(block: Any, x: Tensor) -> Tensor:
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) / block.output_scale_factor


def _around_attention(block: Any, x: Tensor) -> Tensor:
    return x / block.rescale_output_factor


def _identity(block: Any, x: Tensor) -> Tensor:
    return x


def _around(block: Any) -> Callable[[Any, Tensor], Tensor] | None:
    """What remains of a module that can be left out; None for others. Classes go by name: diffusers is optional."""
    names = {cls.__name__ for cls in type(block).__mro__}
    if "ResnetBlock2D" in names:
        return None if block.up or block.down else _shortcut
    if "Attention" in names:
        return _around_attention if getattr(block, "residual_connection", False) else None
    known = {"TransformerEncoderLayer", "TransformerDecoderLayer", "BasicTransformerBlock"}
    return _identity if names & known or getattr(block, "skippable", False) is True else None


@dataclass(frozen=True)
class Blocks:
    """The blocks of a network that can be left out.

    Attributes:
        names: their paths in the network, in the order in which it runs them.
        savings: the share of the network's multiply-adds that leaving each one out saves.
    """

    names: tuple[str, ...]
    savings: tuple[float, ...]

    def check(self, mask: int, owner: str) -> None:
        """Refuse a mask with bits beyond the blocks.

        Raises:
            ValueError: says how many blocks ``owner`` has.
        """
        if mask >> len(self.names):
            raise ValueError(
                f"skip={mask} leaves out block {mask.bit_length() - 1}, but {owner} has {len(self.names)} blocks that "
                f"can be left out. Allowed: 0 to {2 ** len(self.names) - 1}."
            )

    def share(self, mask: int) -> float:
        """What an evaluation with this mask costs, as a share of the whole network's multiply-adds."""
        return 1.0 - sum(saving for bit, saving in enumerate(self.savings) if mask >> bit & 1)


def survey(network: nn.Module, call: Callable[[], Any]) -> Blocks:
    """Find a network's blocks and what each costs, by running it.

    Every block is left out once, and torch's counter says how many multiply-adds (of matrix products, convolutions and
    attentions) that saves, so a shortcut that is kept is paid for. On the meta device nothing is computed.

    Args:
        network: in evaluation mode.
        call: runs it once.

    Returns:
        the blocks that really ran and whose shape survives: one whose output has another shape without it is no block.
    """
    ran: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, block in _found(network):

            def note(module: Any, args: Any, given: Any, output: Any, name: str = name) -> None:
                x, around = _first(args, given), _around(module)
                assert around is not None
                kept = isinstance(output, Tensor) and isinstance(x, Tensor) and around(module, x).shape == output.shape
                ran[name] = kept and ran.get(name, True)

            hooks.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        with torch.no_grad():
            call()
    names = tuple(name for name, kept in ran.items() if kept)[:MAX_BLOCKS]
    whole = multiply_adds(call)

    def less(name: str) -> int:
        with without(network, (name,)):
            return multiply_adds(call)

    savings = (1.0 - less(name) / max(whole, 1) for name in names)
    return Blocks(names, tuple(savings))


def _found(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in network.named_children():
        path = f"{prefix}{name}"
        if _around(child) is not None:
            yield path, child
        else:
            yield from _found(child, f"{path}.")


def multiply_adds(function: Callable[..., Any], *inputs: Any, **options: Any) -> int:
    """How many multiply-adds of matrix products, convolutions and attentions one call takes, as torch counts them."""
    # Encoder layers have a fused kernel for inference, which the counter cannot look into.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(*inputs, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2


@contextmanager
def skipping(network: nn.Module, blocks: Blocks, mask: int) -> Iterator[float]:
    """Within, the network runs without the blocks of a mask.

    With mask 0 nothing is touched. Otherwise only one thread may call the network meanwhile; a worker does so.

    Args:
        network: the one that was surveyed, or another of the same architecture.
        blocks: its blocks.
        mask: bit b leaves out block b.

    Yields:
        the share of the network's multiply-adds that an evaluation takes.

    Raises:
        ValueError: bits beyond the blocks.
    """
    blocks.check(mask, f"this {type(network).__name__}")
    with without(network, tuple(name for bit, name in enumerate(blocks.names) if mask >> bit & 1)):
        yield blocks.share(mask)


@contextmanager
def without(network: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Within, the network runs without the blocks of these names."""
    with ExitStack() as stack:
        for name in names:
            block: Any = network.get_submodule(name)
            before = block.__dict__.get("forward")  # an instance's own, where somebody else replaced it
            stack.callback(_restore, block, before)
            block.forward = _bypass(block)
        yield


def _bypass(block: Any) -> Callable[..., Tensor]:
    around = _around(block)
    assert around is not None
    return lambda *args, **options: around(block, _first(args, options))


def _restore(block: Any, before: Any) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


def _first(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The hidden states that a block is given: its first argument."""
    return args[0] if args else next(iter(options.values()))
