"""What a strategy plans to spend on one sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """Planned cost of one sample: network evaluations, reward calls, decoder calls, backward passes of the network.

    Attributes:
        nfe: network evaluations, guidance included.
        reward_calls: answers of the reward.
        decodes: decoder calls.
        gradients: backward passes through the network.
        exact: false where the numbers are upper bounds, because the strategy may stop early.
    """

    nfe: int
    reward_calls: int = 0
    decodes: int = 0
    gradients: int = 0
    exact: bool = True
