"""Cautious decoding with several trials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters


@filters.register("cautious")
@dataclass(frozen=True)
class Cautious:
    """Cautious: the most likely of several independent trials, more of them where the law is less certain.

    A place with entropy H has ``n = 1 + round((trials - 1) H / log V)`` trials, and the likeliest of the drawn tokens
    is kept. The law of that token is known, so nothing more has to be drawn: with F(v) the probability of all tokens at
    most as likely as v, ``q = F(v)^n - F(v-)^n``, shared evenly among tokens that are equally likely.

    The published method compares whole continuations up to the next punctuation mark by their perplexity; this is the
    same rule for the single token of a place, as an order of tokens that have no left to right needs it.

    Args:
        trials: the most trials of a place; 1 changes nothing.

    Reference: Wang et al. 2025, "Cautious Next Token Prediction".
    Identities: trials=1 changes nothing; many trials at a flat enough law keep the most likely tokens only.
    """

    trials: int = 10

    truncates = True

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"cautious.trials must be at least 1, got {self.trials}: none would remove every token.")

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        probs = log_probs.exp()
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        tries = 1 + torch.round((self.trials - 1) * entropy / math.log(max(log_probs.shape[-1], 2)))
        ordered = probs.sort(dim=-1).values.contiguous()
        cumulative = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0)).clamp(max=1.0)
        below = torch.searchsorted(ordered, probs.contiguous())
        upto = torch.searchsorted(ordered, probs.contiguous(), right=True)
        high, low = cumulative.gather(-1, upto), cumulative.gather(-1, below)
        share = (high**tries - low**tries) / (upto - below)
        return torch.log(torch.where(probs > 0, share, 0.0))
