"""Nucleus truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters


@filters.register("top_p")
@dataclass(frozen=True)
class TopP:
    """Nucleus: the fewest most likely tokens whose probabilities add up to p, the one that crosses it included.

    Args:
        p: share of the probability to keep, above 0 and at most 1.

    Reference: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    Identities: p=1 keeps every token with a probability.
    """

    p: float = 0.9

    truncates = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"top_p.p must be above 0 and at most 1, got {self.p}: at 0 it would remove every token.")

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
        mass = ordered.exp()
        before = mass.cumsum(-1) - mass  # of the tokens that are likelier
        kept = torch.where(before < self.p, ordered, -torch.inf)
        kept[..., 0] = ordered[..., 0]
        return torch.empty_like(log_probs).scatter(-1, order, kept)
