"""Tree-structured Parzen estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("tpe")
@dataclass(frozen=True)
class TPE(OptunaSpec):
    """Tree-structured Parzen estimator, by Optuna; takes conditional axes, choices and several objectives.

    Args:
        num_startup_trials: random trials before the estimator takes over.

    Reference: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; Akiba et al. 2019 (Optuna).
    """

    num_startup_trials: int = 10

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's TPESampler, multivariate, one group for each set of conditional axes."""
        import optuna

        return optuna.samplers.TPESampler(
            seed=seeds.trial, n_startup_trials=self.num_startup_trials, multivariate=True, group=True
        )
