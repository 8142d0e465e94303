"""Locally typical truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters


@filters.register("typical")
@dataclass(frozen=True)
class Typical:
    """Locally typical: tokens whose surprise is nearest to the law's entropy, until their mass reaches ``mass``.

    Args:
        mass: share of the probability to keep, above 0 and at most 1; the token that crosses it is kept.

    Reference: Meister et al. 2023, "Locally Typical Sampling", eq. 12.
    """

    mass: float = 0.9

    truncates = True

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(
                f"typical.mass must be above 0 and at most 1, got {self.mass}: at 0 it would remove every token."
            )

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        entropy = torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
        order = (-log_probs - entropy).abs().argsort(dim=-1, stable=True)  # infinite where there is no probability
        ordered = log_probs.gather(-1, order)
        mass = ordered.exp()
        kept = torch.where(mass.cumsum(-1) - mass < self.mass, ordered, -torch.inf)
        kept[..., 0] = ordered[..., 0]
        return torch.empty_like(log_probs).scatter(-1, order, kept)
