"""Self-attention layers of a diffusers network, and running them with the identity as their attention map.

Reference: Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def self_attentions(network: nn.Module) -> tuple[str, ...]:
    """Paths of the self-attention layers, in the order in which the network holds them.

    These are diffusers' ``Attention`` and its kin that are given no text of their own; joint attention of image and
    text tokens counts.
    """
    found = []
    for name, module in network.named_modules():
        is_attention = any("Attention" in cls.__name__ for cls in type(module).__mro__) and hasattr(module, "to_v")
        if is_attention and not getattr(module, "is_cross_attention", False):
            found.append(name)
    return tuple(found)


def chosen_attentions(network: nn.Module, layers: tuple[str, ...], owner: str) -> tuple[str, ...]:
    """Those self-attention layers whose paths begin with, or have as a part, one of some names.

    Args:
        network: with or without weights.
        layers: names; empty chooses the middle block of a UNet, or the middle layer of another network.
        owner: for messages.

    Raises:
        ValueError: the network has no self-attention, or none of that name.
    """
    names = self_attentions(network)
    if not names:
        raise ValueError(
            f"{owner} has no self-attention layers, whose maps could be perturbed. Use another guidance or model."
        )
    if not layers:
        middle = tuple(name for name in names if name.split(".")[0] == "mid_block")
        return middle or (names[len(names) // 2],)
    for layer in layers:
        if not any(_belongs(name, layer) for name in names):
            raise ValueError(f"{owner} has no self-attention layer {layer!r}. Layers: {', '.join(names)}")
    return tuple(name for name in names if any(_belongs(name, layer) for layer in layers))


def _belongs(name: str, layer: str) -> bool:
    return f".{layer}." in f".{name}."


class _IdentityMaps(TorchFunctionMode):
    """Answers scaled dot-product attention as if every image token attended to no other image token.

    Args:
        num_text: text tokens in a joint attention, which go on attending to all and being attended to by all; without
            any the answer is the values.
        text_first: whether they come before the image's.
    """

    def __init__(self, num_text: int, text_first: bool) -> None:
        super().__init__()
        self.calls, self._num_text, self._text_first = 0, num_text, text_first

    def __torch_function__(
        self,
        function: Callable[..., Any],
        kinds: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, value = (args[i] if len(args) > i else kwargs[name] for i, name in ((0, "query"), (2, "value")))
        self.calls += 1
        assert query.shape[-2] == value.shape[-2], "a self-attention has as many keys as queries"
        if not self._num_text:
            return value
        count = query.shape[-2]
        of_text = torch.arange(count, device=query.device) < self._num_text
        of_text = of_text if self._text_first else of_text.flip(0)
        seen = torch.eye(count, dtype=torch.bool, device=query.device) | of_text | of_text[:, None]
        key = args[1] if len(args) > 1 else kwargs["key"]
        return function(query, key, value, attn_mask=seen)


@contextmanager
def identity_maps(network: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Within, the attention maps of these layers are the identity: their output is their values, projected.

    Of a joint attention of image and text, which is given the text apart, this concerns image tokens among themselves;
    FLUX's single blocks are not told which tokens are which, so there it concerns all.

    Only one thread may call the network meanwhile; a worker does so.
    """
    with ExitStack() as stack:
        for name in names:
            module: Any = network.get_submodule(name)
            before = module.__dict__.get("forward")
            stack.callback(_restore, module, before)
            module.forward = _perturbed(module.forward, name, text_first="Flux" in type(module).__name__)
        yield


def _perturbed(forward: Callable[..., Tensor], name: str, text_first: bool) -> Callable[..., Tensor]:
    def run(*args: Any, **options: Any) -> Tensor:
        text = args[1] if len(args) > 1 else options.get("encoder_hidden_states")
        with _IdentityMaps(0 if text is None else text.shape[1], text_first) as mode:
            output = forward(*args, **options)
        if not mode.calls:
            raise ValueError(
                f"attention layer {name} does not use torch's scaled_dot_product_attention, so its map cannot be "
                "replaced. Use the default attention processor."
            )
        return output

    return run


def _restore(module: Any, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before
