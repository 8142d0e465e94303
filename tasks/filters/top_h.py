"""Entropy-bounded truncation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters, unknown

CRITERIA = ("partial", "renormalised")


@filters.register("top_h")
@dataclass(frozen=True)
class TopH:
    """Top-H: the most likely tokens, one after another, while their entropy stays within a share of the law's.

    Two criteria exist, and keep very different numbers of tokens. ``partial`` is that of the released code, the sum of
    ``-p log p`` over the kept tokens as they stand; ``renormalised`` that of the paper's text, the entropy of the kept
    tokens as a law of their own. The first token is always kept.

    Args:
        alpha: share of the entropy, above 0 and at most 1.
        top_n: the most tokens that are considered.
        criterion: partial or renormalised.

    Reference: Potraghloo et al. 2025, "Top-H Decoding: Adapting the Creativity and Coherence with Bounded Entropy in
        Text Generation", algorithm 1.
    """

    alpha: float = 0.4
    top_n: int = 100
    criterion: str = "partial"

    truncates = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.top_n < 1:
            raise ValueError(
                f"top_h needs alpha above 0 and at most 1, and top_n >= 1, got {self.alpha} and {self.top_n}: without "
                "candidates it would remove every token."
            )
        if self.criterion not in CRITERIA:
            raise unknown("top_h.criterion", self.criterion, list(CRITERIA), "Allowed")

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        bound = self.alpha * torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
        ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
        spent = torch.special.entr(ordered.exp()).cumsum(-1)
        if self.criterion == "renormalised":  # H(p | S) = (sum of -p log p) / mass + log mass
            mass = ordered.exp().cumsum(-1)
            spent = spent / mass + torch.log(mass)
        # With alpha=1 the whole law's entropy is compared with itself.
        fits = (spent <= bound * (1 + 1e-12)).cumprod(-1).bool()
        fits[..., self.top_n :] = False
        fits[..., 0] = True
        return torch.empty_like(log_probs).scatter(-1, order, torch.where(fits, ordered, -torch.inf))
