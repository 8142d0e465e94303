"""Caps on what one sample may cost, for strategies that spend until one is reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def affordable(budget: Mapping[str, float], wanted: int, nfe: int, reward_calls: int = 1) -> int:
    """How many of ``wanted`` equal units fit into the caps, at least 0.

    Args:
        budget: caps on ``nfe``, ``reward_calls`` and ``decodes`` of one sample; others are judged elsewhere.
        wanted: number of units without a cap.
        nfe: network evaluations of one unit.
        reward_calls: reward calls of one unit, each with a decoder call.
    """
    each = {"nfe": nfe, "reward_calls": reward_calls, "decodes": reward_calls}
    return min([wanted, *(int(budget[key] // cost) for key, cost in each.items() if key in budget and cost > 0)])


class Meter:
    """Network evaluations per row since it was made, read from the counter around the model."""

    def __init__(self, sampler: Any) -> None:
        self._model, self._first = sampler.model, sampler.model.rows

    def per(self, rows: int) -> int:
        """Evaluations that each of ``rows`` rows cost."""
        return (self._model.rows - self._first) // rows
