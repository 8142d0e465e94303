"""What one sample of a strategy is planned to cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """Planned cost of one sample: network evaluations, reward and decoder calls, backward passes through the network.

    Attributes:
        nfe: network evaluations, guidance included.
        reward_calls: calls of the reward.
        decodes: calls of the decoder before a reward.
        gradients: backward passes through the network.
        exact: False where the strategy decides as it goes, and the numbers are upper bounds.
    """

    nfe: int
    reward_calls: int = 0
    decodes: int = 0
    gradients: int = 0
    exact: bool = True
