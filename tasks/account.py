"""What a strategy plans to spend on one sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """Planned cost of one sample: network evaluations, reward calls, decoder calls, backward passes of the network.

    Attributes:
        nfe: network evaluations.
        reward_calls: calls of the reward.
        decodes: calls of the model's decoder.
        gradients: backward passes through the network.
        exact: whether that is what will be spent; otherwise it is an upper bound.
    """

    nfe: int
    reward_calls: int = 0
    decodes: int = 0
    gradients: int = 0
    exact: bool = True
