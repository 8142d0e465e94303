"""Predictor-guided evolution of solver schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.adapters.optuna_search.spec import OptunaSpec
from orchestrator.adapters.optuna_search.study import Seeds
from orchestrator.ports import SearchContext
from orchestrator.registries import searches
from orchestrator.space import Space


@searches.register("s3")
@dataclass(frozen=True)
class S3(OptunaSpec):
    """S3: an evolution of whole schedules in stages, in which a learned predictor of quality picks whom to evaluate.

    The baselines and some random points are evaluated; then, stage by stage, a predictor is fitted to all that is
    known, an evolution runs on it, and its most promising points are evaluated. Made for ``space.schedule`` with
    choices at every step.

    Args:
        num_startup_trials: trials before the first prediction.
        batch: evaluations of a stage.
        parents: how many of the best found points have children.
        predictor: whether a predictor chooses; without it the same evolution evaluates its children directly.

    Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models"
        (S3); the predictor and the sizes of the stages are ours.
    """

    num_startup_trials: int = 16
    batch: int = 4
    parents: int = 4
    predictor: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.several:
            raise ValueError("search s3 takes one objective. Use nsga2 or tpe for several.")
        for name in ("num_startup_trials", "batch", "parents"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be at least 1, got {getattr(self, name)}.")

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Our own sampler."""
        from orchestrator.adapters.optuna_samplers import S3Sampler

        return S3Sampler(
            space, seeds.search, self.num_startup_trials, self.batch, self.parents, predictor=self.predictor
        )
