"""Exact log-probabilities of token strings: the energy of energy-based sampling and the judge of perplexity.

A loaded token model may have ``energy_log_prob(tokens, cond)``: the log-probability in nats of whole strings under a
law that can be written down, (B, L) int64 and (B,) int64 labels or None -> (B,) float64. For ``table`` it is the joint
itself; for ``digits_tokens`` that of the autoregressive network below.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tasks import token_network
from tasks.checkpoint import WEIGHTS
from tasks.tokens import check_tokens


@dataclass(frozen=True)
class Autoregressive:
    """The class-conditional autoregressive transformer of the digits' grey levels, in raster order.

    ``log p(x | c) = sum_l log p(x_l | x_1 .. x_{l-1}, c)``, one network call for all l. It knows no masks and is no
    model that a sampler could step.

    Args:
        folder: where it lies; trained by ``solvus train digits_tokens_ar``.

    Raises:
        ValueError: the folder holds no such network.
    """

    folder: Path = WEIGHTS / "digits_tokens_ar"

    def __post_init__(self) -> None:
        if not token_network.read_config(self.folder).causal:
            raise ValueError(
                f"the network in {self.folder} sees the whole text, so it has no log-probability. Give one that "
                "solvus train digits_tokens_ar made."
            )

    @property
    def revision(self) -> str:
        """Hash of weights and sizes."""
        return token_network.revision(self.folder)

    def log_prob(self, tokens: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p(x | c) in nats, (B, L) int64 -> (B,) float64; no labels, or the number of classes, mean "no label"."""
        network = token_network.load(self.folder, str(tokens.device))
        check_tokens(tokens, network.config.vocabulary, network.config.length)
        if cond is None:
            cond = torch.full_like(tokens[:, 0], network.config.num_classes)
        log_p = network(tokens, cond).double().log_softmax(-1)
        return log_p.gather(-1, tokens[..., None])[..., 0].sum(dim=1)
