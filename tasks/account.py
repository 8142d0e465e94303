"""What one sample of a strategy is planned to cost, and the caps that it must keep to.

Costs are counted per sample: network evaluations, calls of the reward, calls of the decoder before a reward, and
device-seconds. The first three are planned; seconds are only known once they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CAPS = ("nfe", "reward_calls", "decodes", "seconds")


@dataclass(frozen=True)
class Account:
    """Planned cost of one sample: network evaluations, reward and decoder calls, backward passes through the network.

    Attributes:
        nfe: network evaluations, guidance included.
        reward_calls: calls of the reward.
        decodes: calls of the decoder before a reward.
        gradients: backward passes through the network.
        exact: False where the strategy decides as it goes, or the solver saves evaluations, and the numbers are upper
            bounds; or where the solver chooses its steps, and ``nfe`` is a lower one.
    """

    nfe: int
    reward_calls: int = 0
    decodes: int = 0
    gradients: int = 0
    exact: bool = True


def steps(solver: Any, num_steps: int, to_data: bool = True) -> list[int]:
    """Evaluations of each step of a run.

    Args:
        solver: the plug-in; one whose steps cannot be told from shorter runs has ``step_nfe(num_steps, to_data)``.
        num_steps: steps of the grid.
        to_data: whether the run ends at t=0.
    """
    if hasattr(solver, "step_nfe"):
        return solver.step_nfe(num_steps, to_data)
    before = getattr(solver, "nfe_before_data", solver.nfe)
    spent = [0, *(before(k) for k in range(1, num_steps)), (solver.nfe if to_data else before)(num_steps)]
    return [b - a for a, b in zip(spent, spent[1:], strict=False)]


def check_budget(name: str, budget: Mapping[str, Any], account: Account, adaptive: str = "") -> None:
    """Refuse caps that make no sense, or that a strategy cannot keep to.

    Seconds cannot be judged here: a trial whose samples took longer than the cap fails when it is measured.

    Args:
        name: of the strategy, for messages.
        budget: caps per sample.
        account: what one sample is planned to cost, within the budget where the strategy adapts to it.
        adaptive: name of the solver, if it chooses its own steps.

    Raises:
        ValueError: an unknown or impossible cap, or a cost above one, with the numbers.
    """
    for key, cap in budget.items():
        if key not in CAPS:
            raise ValueError(f"strategy.budget has no cap {key!r}. Allowed: {', '.join(CAPS)}.")
        if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 <= cap < math.inf:
            raise ValueError(f"strategy.budget.{key} must be a number of at least 0, got {cap!r}.")
        if key == "seconds":
            continue
        if key == "nfe" and adaptive:
            raise ValueError(
                f"strategy.budget.nfe={cap} cannot be kept: solver {adaptive} chooses its own steps as it goes. Use "
                "another solver, or leave strategy.budget.nfe out."
            )
        planned = getattr(account, key)
        if planned > cap:
            raise ValueError(
                f"strategy {name} may spend {planned} {WORDS[key]} a sample ({_all(account)}), above "
                f"strategy.budget.{key}={cap}. Raise it, or use fewer steps (nfe=...) or candidates."
            )


WORDS = {"nfe": "network evaluations", "reward_calls": "reward calls", "decodes": "decoder calls"}


def _all(account: Account) -> str:
    bound = "" if account.exact else "at most "
    return bound + ", ".join(f"{key}={getattr(account, key)}" for key in WORDS)
