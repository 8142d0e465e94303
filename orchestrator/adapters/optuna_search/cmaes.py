"""Covariance matrix adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.distributions import distribution, with_space
from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Axis, Space, label


@searches.register("cmaes")
@dataclass(frozen=True)
class CMAES(OptunaSpec):
    """CMA-ES, by Optuna: for numbers that interact, such as the nodes and weights of one schedule.

    It starts at the best baseline that is a point of the space, or near one, and keeps that one's choices (predictions,
    orders, correctors): the numbers are what it searches.

    Args:
        population: trials of a generation; 0 takes 4 + 3 ln(dimensions).
        sigma: initial standard deviation, as a fraction of each interval; small, since the start is a good schedule.

    Reference: Hansen and Ostermeier 2001, "Completely Derandomized Self-Adaptation in Evolution Strategies"; Nomura and
        Shibata 2024 (cmaes).
    """

    population: int = 0
    sigma: float = 0.06  # the start is good already; docs/search.md has what other widths gave

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several:
            raise ValueError("search cmaes takes one objective. Use nsga2 or tpe for several.")
        if self.population < 0 or self.population == 1:
            raise ValueError(f"search.population must be 0 (automatic) or at least 2, got {self.population}.")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"search.sigma must be above 0 and at most 1, got {self.sigma}.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's CmaEsSampler; its state lies in the storage with the trials."""
        import optuna

        given = start or space.middle()

        def first(axis: Axis) -> Any:
            if axis.choices is not None:
                return axis.nearest(given.get(axis.name, axis.choices[0]))
            return given.get(axis.name, axis.at(0.5))

        point = space.walk(first)[0]
        axes = {axis.name: axis for axis in space.axes}
        numbers = {name: distribution(axes[name]) for name in point if axes[name].choices is None}
        numbers = {name: d for name, d in numbers.items() if not d.single()}
        made: Any = optuna.samplers.CmaEsSampler(
            seed=seeds.trial,
            x0={name: point[name] for name in numbers},
            sigma0=self.sigma,
            n_startup_trials=0,
            popsize=self.population or None,
            warn_independent_sampling=False,
        )
        made.sample_independent = lambda study, trial, name, d: label(
            axes[name].nearest(point.get(name, given.get(name)))
        )
        return with_space(made, numbers)
