"""Gaussian-process search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.distributions import Covering, shared, with_space
from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("gp")
@dataclass(frozen=True)
class GP(OptunaSpec):
    """Bayesian optimisation with a Gaussian process, by Optuna: for few, expensive trials.

    Conditional axes are drawn at random.

    Args:
        num_startup_trials: random trials before the process takes over.

    Reference: Snoek et al. 2012, "Practical Bayesian Optimization of Machine Learning Algorithms".
    """

    num_startup_trials: int = 10

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's GPSampler."""
        import optuna

        fixed = shared(space)
        made: Any = optuna.samplers.GPSampler(seed=seeds.trial, n_startup_trials=self.num_startup_trials)
        sample = made.sample_relative
        made.sample_relative = lambda study, trial, _: sample(Covering(study, fixed), trial, fixed)
        return with_space(made, fixed)
