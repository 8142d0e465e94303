"""The ledger: what was spent, in evaluations, reward calls, device-seconds and money."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.store import Store
from tasks import registry
from tasks.recipe import Recipe
from tasks.registry import Spec

# What is counted of a shard: of its rows, which of these a trial's own rows have, and of its scores.
OF_ROWS = ("nfe", "nfe_reused", "reward_calls", "decodes", "generate_s", "reward_s", "reward_reused")
COUNTED = ("rows", *OF_ROWS, "score_s", "scored")


def nothing() -> dict[str, float]:
    """The cost of a shard before anything was done."""
    return {name: 0.0 if name.endswith("_s") else 0 for name in COUNTED}


@dataclass
class Ledger:
    """Costs of one launch; what the store already had is not in it.

    Attributes:
        price_per_device_hour: money for one hour of one device.
        spent: sums over the shards of this launch.
    """

    price_per_device_hour: float = 0.0
    spent: dict[str, float] = field(default_factory=nothing)

    def add(self, cost: Mapping[str, Any]) -> None:
        """One shard's cost."""
        for name in self.spent:
            self.spent[name] += cost.get(name, 0)

    @property
    def device_seconds(self) -> float:
        """Generating and scoring together."""
        return self.spent["generate_s"] + self.spent["score_s"]

    def summary(self) -> dict[str, float]:
        """Sums, device-seconds and money; seconds of rewards inside strategies are part of generating."""
        money = self.device_seconds / 3600 * self.price_per_device_hour
        return self.spent | {"device_s": self.device_seconds, "money": money}

    def speedup(self, recipe: Recipe, scorers: list[Spec], start: int, stop: int, store: Store) -> dict[str, float]:
        """How many times faster the rows [start, stop) were made than their companions without savings, as measured.

        Returns:
            ``{"speedup": ratio of device-seconds}``; empty where rows are compared with none.
        """
        for spec in scorers:
            other = recipe.companion(spec) if getattr(registry.scorer(spec), "compares_seconds", False) else None
            if other is not None:
                spent, whole = (self.cost_of(r, [], start, stop, store)["generate_s"] for r in (recipe, other))
                return {"speedup": whole / spent} if spent and whole else {}
        return {}

    def cost_of(self, recipe: Recipe, scorers: list[Spec], start: int, stop: int, store: Store) -> dict[str, float]:
        """What the rows [start, stop) and their scores cost whoever made them, from their records, in proportion."""
        total = dict.fromkeys((*OF_ROWS, "score_s"), 0.0)
        tables = [("rows", recipe.key), *(("columns", recipe.column_key(spec)) for spec in scorers)]
        for kind, key in tables:
            for record, low, high in store.used(kind, key, start, stop):
                for name in total:
                    total[name] += (high - low) / record.rows * record.ledger.get(name, 0.0)
        return total | {"money": (total["generate_s"] + total["score_s"]) / 3600 * self.price_per_device_hour}
