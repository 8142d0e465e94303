"""Uniform random search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("random")
@dataclass(frozen=True)
class Random(OptunaSpec):
    """Uniform random search, by Optuna: the baseline of every other search.

    Reference: Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization".
    """

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's RandomSampler."""
        import optuna

        return optuna.samplers.RandomSampler(seed=seeds.trial)
