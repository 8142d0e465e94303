"""The embedded masked diffusion model of handwritten digits as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks import token_network
from tasks.autoregressive import Autoregressive
from tasks.checkpoint import WEIGHTS, digits_reference
from tasks.processes import Masked
from tasks.recipe import digest
from tasks.registry import models
from tasks.token_network import TokenNetworkConfig
from tasks.tokens import token_ids


@models.register("digits_tokens")
@dataclass(frozen=True)
class DigitsTokens:
    """The embedded class-conditional masked transformer of 8x8 digits, 64 tokens of 17 grey levels.

    A token is the grey level 0..16 of scikit-learn's digits, the mask is token 17. Samples are decoded to images in
    [-1, 1] with those levels, so that rewards and metrics of images serve them; ``tasks.tokens`` reads the levels back.

    Args:
        path: another folder with the same kind of model; null takes the one that comes with Solvus.

    Reference: Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models" (training); Ou et al. 2024
        (no time enters); Ho and Salimans 2022 (label dropout).
    """

    path: str | None = None

    gives = ("posterior_mean", "energy_log_prob")
    ignores_time = True
    kind = "image"

    def __post_init__(self) -> None:
        config = self.config
        if config.causal or (config.vocabulary, config.height, config.width) != (17, 8, 8):
            raise ValueError(
                f"{self._folder} holds a network over {config.height}x{config.width} tokens of {config.vocabulary} "
                f"levels{', which sees only what comes before' if config.causal else ''}. digits_tokens needs one over "
                "8x8 tokens of 17 levels that sees all: solvus train digits_tokens."
            )

    @property
    def _folder(self) -> Path:
        return Path(self.path) if self.path else WEIGHTS / "digits_tokens"

    @cached_property
    def config(self) -> TokenNetworkConfig:
        """The sizes of the network."""
        return token_network.read_config(self._folder)

    @property
    def vocabulary(self) -> int:
        """Number of real tokens V."""
        return self.config.vocabulary

    @property
    def shape(self) -> tuple[int, ...]:
        """(L,), of states."""
        return (self.config.length,)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(1, 8, 8), of what is stored."""
        return (1, self.config.height, self.config.width)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.config.num_classes

    @property
    def noising(self) -> Masked:
        """The process object."""
        return Masked(self.config.vocabulary)

    @property
    def revision(self) -> str:
        """Hash of the weights, those of the energy among them: a solver may look at it."""
        return digest([token_network.revision(self._folder), Autoregressive().revision])[:16]

    @property
    def log_prob_revision(self) -> str:
        """Hash of the law behind ``energy_log_prob``."""
        return Autoregressive().revision

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()

    def load(self, device: str) -> TokenDenoiser:
        """The denoiser on a device."""
        return TokenDenoiser(self, device)


class TokenDenoiser:
    """A masked transformer as a denoiser."""

    def __init__(self, spec: DigitsTokens, device: str) -> None:
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, spec.num_classes
        self.sample_shape = spec.sample_shape
        self.network = token_network.load(spec._folder, device)

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None = None) -> Tensor:
        """Class probabilities of every token, (B, L) int64 -> (B, L, V) float64; visible tokens have probability 1.

        The time does not matter: which tokens are masked says all. ``cond`` holds labels; ``num_classes`` or None means
        none.
        """
        if cond is None:
            cond = torch.full_like(x[:, 0], self.num_classes)
        p = self.network(x, cond).double().softmax(-1)
        known = torch.nn.functional.one_hot(x.clamp(max=self.process.mask - 1), self.process.vocabulary)
        return torch.where((x == self.process.mask)[..., None], p, known.to(p.dtype))

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] with 17 grey levels, (B, 64) int64 -> (B, 1, 8, 8) float32."""
        return (x0.float() / ((self.process.vocabulary - 1) / 2) - 1.0).view(-1, *self.sample_shape)

    def encode(self, samples: Tensor) -> Tensor:
        """The tokens of images, (B, 1, 8, 8) -> (B, 64) int64."""
        return token_ids(samples)

    def energy_log_prob(self, tokens: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p(x | c) in nats under the autoregressive model of the same tokens, (B, L) int64 -> (B,) float64."""
        return Autoregressive().log_prob(tokens, cond)
