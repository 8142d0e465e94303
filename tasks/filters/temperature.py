"""Temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.registry import filters


@filters.register("temperature")
@dataclass(frozen=True)
class Temperature:
    """Temperature: ``p^(1 / T)``, normalised; below 1 likely tokens gain, at 0 only the most likely is left.

    Args:
        temperature: T >= 0; of equally likely tokens T=0 keeps the first.

    Reference: Ackley, Hinton and Sejnowski 1985, "A learning algorithm for Boltzmann machines".
    Identities: T=1 changes nothing.
    """

    temperature: float = 1.0

    truncates = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}. 1 changes nothing.")

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Logits, (…, V)."""
        if self.temperature > 0:
            return log_probs / self.temperature
        best = log_probs.argmax(dim=-1, keepdim=True)
        return torch.full_like(log_probs, -torch.inf).scatter(-1, best, 0.0)
