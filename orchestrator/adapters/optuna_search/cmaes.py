"""Covariance matrix adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.distributions import shared, with_space
from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("cmaes")
@dataclass(frozen=True)
class CMAES(OptunaSpec):
    """CMA-ES, by Optuna: for numbers that interact, such as the nodes and weights of one schedule.

    It starts at the best baseline that is a point of the space. Choices are drawn at random: fix them, or search them
    with another algorithm.

    Args:
        population: trials of a generation; 0 takes 4 + 3 ln(dimensions).
        sigma: initial standard deviation, as a fraction of each interval.

    Reference: Hansen and Ostermeier 2001, "Completely Derandomized Self-Adaptation in Evolution Strategies"; Nomura and
        Shibata 2024 (cmaes).
    """

    population: int = 0
    sigma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several:
            raise ValueError("search cmaes takes one objective. Use nsga2 or tpe for several.")
        if self.population < 0 or self.population == 1:
            raise ValueError(f"search.population must be 0 (automatic) or at least 2, got {self.population}.")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"search.sigma must be above 0 and at most 1, got {self.sigma}.")

    def sampler(self, space: Space, seed: int, start: dict[str, Any] | None) -> Any:
        """Optuna's CmaEsSampler; its state lies in the storage with the trials."""
        import optuna

        fixed = shared(space, numbers_only=True)
        first = {name: value for name, value in (start or {}).items() if name in fixed}
        if set(first) != set(fixed):
            first = {name: value for name, value in space.middle().items() if name in fixed}
        made = optuna.samplers.CmaEsSampler(
            seed=seed,
            x0=first,
            sigma0=self.sigma,
            n_startup_trials=0,
            popsize=self.population or None,
            warn_independent_sampling=False,
        )
        return with_space(made, fixed)
