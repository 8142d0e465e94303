"""What a family of diffusers pipelines has to answer; the files in ``families/`` say the rest."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks.registry import unknown

Encoded = dict[str, Tensor]


@dataclass(frozen=True)
class StockSchedule:
    """How a saved pipeline sets up a scheduler.

    Attributes:
        config: fields of its scheduler's configuration.
        options: what it hands to a scheduler with some configuration, for a number of steps; plain data.
    """

    config: Mapping[str, Any]
    options: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda config, steps: {}


@dataclass(frozen=True)
class Setting:
    """What a family is told beside states and prompts.

    Attributes:
        height, width: of the image, in pixels.
        embedded_guidance: the guidance scale that a distilled network takes as an input; None leaves the default.
        max_tokens: length of a T5 sequence; None leaves the pipeline's default.
    """

    height: int
    width: int
    embedded_guidance: float | None = None
    max_tokens: int | None = None


class Family:
    """Pipelines with the same network, text encoders and decoder.

    Attributes:
        pipelines: class names in diffusers.
        network: the component that denoises.
        text: the components that encode text, with their tokenizers; none where conditions are labels.
        vae: whether states are latents of a decoder.
        optional: components that may be saved as null.
        multiple: image sides must be whole multiples of the decoder's factor times this.
        takes_tokens: whether the length of a text's sequence can be chosen.
    """

    pipelines: tuple[str, ...] = ()
    network = "transformer"
    text: tuple[str, ...] = ()
    vae = True
    optional: tuple[str, ...] = ()
    multiple = 1
    takes_tokens = False

    @property
    def components(self) -> tuple[str, ...]:
        """Everything that images depend on."""
        return (self.network, *(("vae",) if self.vae else ()), *self.text)

    def saved(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Those components that a pipeline was saved with, by its index; optional ones may be null."""
        return tuple(n for n in self.components if n not in self.optional or (index.get(n) or [None])[0] is not None)

    def text_parts(self, components: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some components that encode text."""
        return tuple(name for name in components if name in self.text)

    def classes(self, config: Mapping[str, Any]) -> int:
        """Labels that the network knows, where conditions are labels."""
        return 0

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether the network takes a guidance scale as an input."""
        return False

    def check_network(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """Refuse a network, or a size of its states, that could not be run.

        Raises:
            ValueError: says which, and what is allowed.
        """

    def channels(self, config: Mapping[str, Any]) -> int:
        """Channels of a state."""
        return int(config["in_channels"])

    def factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels a side of one latent pixel."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def default_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of a state where the user gives none."""
        size = config["sample_size"]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def grid_options(self, scheduler: Mapping[str, Any], shape: tuple[int, ...], num_steps: int) -> dict[str, Any]:
        """What the stock pipeline hands to its scheduler beside a number of steps, to lay its grid.

        Args:
            scheduler: its configuration.
            shape: of a state.
            num_steps: their number.
        """
        return {}

    def encode(self, pipe: Any, text: str | None, setting: Setting, device: str) -> Encoded:
        """What the network is given for one text, each (1, ...); None is the pipeline's own empty condition."""
        raise AssertionError(f"{type(self).__name__} takes labels")

    def blank(self, config: Mapping[str, Any], setting: Setting) -> Any:
        """Conditions of one row that say nothing, of the shapes that the network takes: where its work is counted."""
        raise AssertionError("every family defines it")

    def predict(self, pipe: Any, net: Any, x: Tensor, n: Tensor, cond: Any, setting: Setting) -> Tensor:
        """The network's answer, (B, *shape).

        Args:
            pipe: the loaded pipeline.
            net: its network, or one in its place.
            x: states in the network's dtype.
            n: model times (training steps), (B,) float32.
            cond: encoded texts, (B, ...) each; or labels, (B,) int64.
        """
        raise AssertionError("every family defines it")

    def unscale(self, config: Any, x0: Tensor) -> Tensor:
        """Latents as the decoder takes them."""
        return x0 / config.scaling_factor

    def decode(self, pipe: Any, x0: Tensor) -> Tensor:
        """Images around [-1, 1], (B, 3, H, W), of clean latents."""
        return pipe.vae.decode(self.unscale(pipe.vae.config, x0).to(pipe.vae.dtype), return_dict=False)[0]


def first_half(output: Tensor, channels: int) -> Tensor:
    """The mean of a network that learned its variance too."""
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def resolution_shift(scheduler: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, float]:
    """The logarithm of the time shift for an image's number of 2x2 patches, where a scheduler shifts by resolution.

    Reference: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2; linear in the tokens as in
    diffusers' ``calculate_shift``.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return {}
    tokens = shape[-2] * shape[-1] / 4
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return {"mu": least + (most - least) * (tokens - low) / (high - low)}


def guidance_embedding(pipe: Any, net: Any, scale: float, x: Tensor) -> Tensor | None:
    """The guidance scale as an input of a distilled UNet, (B, D); None where it has none. Zeros without a pipeline."""
    width = net.config.time_cond_proj_dim
    if width is None:
        return None
    if pipe is None:  # where work is counted
        return torch.zeros(len(x), width, dtype=x.dtype, device=x.device)
    scales = torch.full((len(x),), scale - 1.0)
    return pipe.get_guidance_scale_embedding(scales, embedding_dim=width).to(x.device, x.dtype)


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Every family, by the class names of its pipelines."""
    package = importlib.import_module("tasks.pipelines.families")
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.pipelines, family)
    return found


def family_of(name: str, root: str) -> Family:
    """The family of a pipeline's class.

    Raises:
        ValueError: a class that has no adapter.
    """
    if name not in families():
        raise ValueError(f"{root} cannot be sampled: {unknown('pipeline class', name, sorted(families()), 'Known')}")
    return families()[name]
