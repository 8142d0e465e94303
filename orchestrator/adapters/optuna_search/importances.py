"""Which parameters of a search mattered."""

from __future__ import annotations

import warnings
from typing import Any


def importances(study: Any, objective: int = 0) -> dict[str, float]:
    """Share of the objective's variance that each parameter explains, largest first; empty where too little is known.

    Functional ANOVA over the parameters that all finished trials have; conditional ones are left out.

    Reference: Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance" (fANOVA).
    """
    import optuna

    done = [t for t in study.get_trials(deepcopy=False) if t.values is not None and t.params]
    shared = set.intersection(*(set(t.params) for t in done)) if done else set()
    varying = [name for name in sorted(shared) if len({t.params[name] for t in done}) > 1]
    if len(done) < 4 or not varying or len({t.values[objective] for t in done}) < 2:
        return {}
    clean = optuna.create_study()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in done:
            clean.add_trial(
                optuna.trial.create_trial(
                    params={name: trial.params[name] for name in varying},
                    distributions={name: trial.distributions[name] for name in varying},
                    value=trial.values[objective],
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(clean, evaluator=evaluator)
    return {name: float(value) for name, value in found.items()}
