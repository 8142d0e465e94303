"""Two-stage evolution over time steps and compressed networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("autodiffusion")
@dataclass(frozen=True)
class AutoDiffusion(OptunaSpec):
    """AutoDiffusion: an evolution over time steps first, then over the blocks that every step leaves out as well.

    The space needs free nodes (``schedule.times: free``); ``schedule.skip: N`` lets each step leave out any of the
    network's first N skippable blocks.

    Args:
        population: evaluations of a generation.
        parents: how many of the best have children.
        mutants: mutants of a generation.
        crossovers: crossings of a generation; random points fill it up.
        time_generations: generations over time steps alone, at most; fewer if they bring nothing better.
        max_skip: largest share of blocks left out, over all steps.
        growth: generations in which the share grows to that.

    Reference: Li et al. 2023, "AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
        Diffusion Model Acceleration".
    """

    population: int = 20
    parents: int = 6
    mutants: int = 10
    crossovers: int = 6
    time_generations: int = 5
    max_skip: float = 0.1
    growth: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several:
            raise ValueError("search autodiffusion takes one objective. Use nsga2 or tpe for several.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Our own sampler."""
        from orchestrator.adapters.optuna_samplers import AutoDiffusionSampler

        return AutoDiffusionSampler(
            space, seeds.search, self.population, self.parents, self.mutants, self.crossovers,
            time_generations=self.time_generations, max_skip=self.max_skip, growth=self.growth,
        )  # fmt: skip
