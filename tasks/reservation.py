"""The value at which it no longer pays to draw another sample (Weitzman's reservation value)."""

from __future__ import annotations

import math


def gain(h: float) -> float:
    """``E[(Z - h)_+] = phi(h) - h (1 - Phi(h))`` for a standard normal Z; falls from infinity to 0."""
    density = math.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return density - h * 0.5 * math.erfc(h / math.sqrt(2))


def reservation(mean: float, std: float, cost: float) -> float:
    """z with ``E[(R - z)_+] = cost`` for R normal with this mean and standard deviation.

    Stopping at the first sample that reaches z is optimal, and its expected net value (best reward less cost of all
    draws) is z itself, where draws are unlimited.

    Reference: Weitzman 1979, "Optimal search for the best alternative", eq. 7.
    """
    ratio = cost / std
    low, high = -ratio - 1.0, 38.0  # gain(h) > -h, and gain(38) is below the smallest number
    while high - low > 1e-12 * max(1.0, abs(low)):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if gain(middle) > ratio else (low, middle)
    return mean + std * 0.5 * (low + high)
