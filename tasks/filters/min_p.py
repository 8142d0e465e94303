"""Min-p truncation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters


@filters.register("min_p")
@dataclass(frozen=True)
class MinP:
    """Min-p: tokens that are at least ``p_min`` times as likely as the most likely one.

    Args:
        p_min: from 0, which keeps all, to 1, which keeps the most likely only.

    Reference: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """

    p_min: float = 0.1

    truncates = True

    def __post_init__(self) -> None:
        if not 0 <= self.p_min <= 1:
            raise ValueError(
                f"min_p.p_min must be between 0 and 1, got {self.p_min}: above 1 it would remove every token."
            )

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        if self.p_min == 0:
            return log_probs
        best = log_probs.max(dim=-1, keepdim=True).values
        return torch.where(log_probs >= best + math.log(self.p_min), log_probs, -torch.inf)
