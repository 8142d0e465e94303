"""Evolution towards a Pareto front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.distributions import shared, with_space
from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("nsga2")
@dataclass(frozen=True)
class NSGA2(OptunaSpec):
    """NSGA-II, by Optuna: many trials, one objective or several, quality against cost.

    Args:
        population: trials of a generation.

    Reference: Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".
    """

    population: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 2:
            raise ValueError(f"search.population must be at least 2, got {self.population}.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's NSGAIISampler."""
        import optuna

        return with_space(
            optuna.samplers.NSGAIISampler(seed=seeds.trial, population_size=self.population), shared(space)
        )
