"""Bayesian optimisation in a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("turbo")
@dataclass(frozen=True)
class Turbo(OptunaSpec):
    """TuRBO: a Gaussian process in a trust region around the best point, started at the best baseline.

    The quickest for times and weights of a schedule, up to some thirty numbers: trials share their samples, so their
    losses are a smooth function of these.

    Args:
        length: first side of the region, as a fraction of each axis.

    Reference: Eriksson et al. 2019, "Scalable Global Optimization via Local Bayesian Optimization".
    """

    length: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several:
            raise ValueError("search turbo takes one objective. Use nsga2 or tpe for several.")
        if not 0.01 <= self.length <= 1:
            raise ValueError(f"search.length must lie between 0.01 and 1, got {self.length}.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Our own sampler."""
        from orchestrator.adapters.optuna_samplers import TurboSampler

        return TurboSampler(space, seeds.search, start, self.length)
