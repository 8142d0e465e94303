"""Linear layers and convolutions in int8: ranges of their inputs, and running them on integers.

Inputs are unsigned 8-bit with one scale and zero point a layer, weights signed 8-bit with a scale an output channel, as
oneDNN's CPU kernels take them; sums come out in float32. What lies between the layers (normalisation, activation
functions, attention) stays in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 255
SHARES = np.linspace(0.4, 1.0, 25)  # of the full range, among which the best range is searched
KEPT = 4096  # values of one layer and evaluation that its range is fitted to


def layers_of(network: nn.Module) -> dict[str, Any]:
    """The layers that can be quantised, by their paths."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.padding_mode == "zeros")
    }


def best_range(values: Tensor) -> tuple[float, float]:
    """Scale and zero point of the range around zero that rounds values with the least mean squared error.

    Args:
        values: (N,) float.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    found, least = (1.0, 0.0), float("inf")
    for share in SHARES:
        scale = max((high - low) * float(share) / LEVELS, 1e-12)
        zero = float(np.clip(round(-low * share / scale), 0, LEVELS))
        rounded = (torch.clamp(torch.round(values / scale) + zero, 0, LEVELS) - zero) * scale
        error = float((rounded - values).square().mean())
        if error < least:
            found, least = (scale, zero), error
    return found


class Recorder:
    """Keeps some of the values that enter each layer while it is listening."""

    def __init__(self, network: nn.Module) -> None:
        self._layers = layers_of(network)
        self._kept: dict[str, list[Tensor]] = {name: [] for name in self._layers}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, every evaluation adds to what is kept."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():

                def note(module: Any, args: Any, name: str = name) -> None:
                    flat = args[0].detach().flatten()
                    self._kept[name].append(flat[:: max(1, flat.numel() // KEPT)].float().clone())

                stack.callback(layer.register_forward_pre_hook(note).remove)
            yield

    def ranges(self) -> np.ndarray:
        """Scale and zero point of every layer's inputs, (layers, 2) float64; forgets what was kept.

        Raises:
            ValueError: a layer that the network did not run.
        """
        idle = [name for name, values in self._kept.items() if not values]
        if idle:
            raise ValueError(f"layer {idle[0]} did not run during calibration, so its range is not known.")
        found = np.array([best_range(torch.cat(values)) for values in self._kept.values()])
        for values in self._kept.values():
            values.clear()
        return found


def integer(layer: Any, scale: float, zero: int) -> Callable[..., Tensor]:
    """A layer's forward on integers, with its weights packed.

    Args:
        layer: linear or convolution, on the CPU.
        scale, zero: scale and zero point of its inputs.
    """
    ops: Any = torch.ops.onednn
    weight = layer.weight.detach().float()
    scales = (weight.flatten(1).abs().amax(dim=1) / 127).clamp_min(1e-12)
    integers = torch.round(weight / scales.view(-1, *[1] * (weight.dim() - 1))).to(torch.int8)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    bias = None if layer.bias is None else layer.bias.detach().float()
    end: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # float32 out, nothing fused
    place: tuple[Any, ...] = ()
    if isinstance(layer, nn.Linear):
        packed, run = ops.qlinear_prepack(integers, None), ops.qlinear_pointwise
    else:
        place = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        packed, run = ops.qconv_prepack(integers, scales, scale, zero, *place, None), ops.qconv_pointwise

    def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
        q = torch.round(x.float() / scale).add_(zero).clamp_(0, LEVELS).to(torch.uint8)
        return run(q, scale, zero, packed, scales, zeros, bias, *place, *end).to(x.dtype)

    return forward


@contextmanager
def on_integers(network: nn.Module, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Within, the network's layers run on integers.

    Args:
        network: on the CPU.
        forwards: of its layers, in order (:func:`integer`).
    """
    with ExitStack() as stack:
        for layer, forward in zip(layers_of(network).values(), forwards, strict=True):
            stack.callback(_restore, layer, layer.__dict__.get("forward"))
            layer.forward = forward
        yield


def _restore(layer: Any, before: Any) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before
