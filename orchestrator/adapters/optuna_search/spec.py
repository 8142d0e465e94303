"""What every search that is an Optuna study has in common: its space, budget, objectives, race and constraints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from orchestrator.adapters.optuna_search.study import OptunaSearch, Seeds
from orchestrator.ports import SearchContext
from orchestrator.racing import Racing
from orchestrator.registries import searches
from orchestrator.space import Space, check_space
from tasks.registry import unknown

CONSTRAINTS = ("nfe", "reward_calls", "decodes", "device_s")


@dataclass(frozen=True)
class OptunaSpec:
    """The fields that all of them share.

    Args:
        space: dotted path -> ``{low, high}`` (with ``log: true`` or ``step``), or a list of choices; ``when`` makes an
            axis conditional; ``schedule`` opens a whole solver schedule (``orchestrator/schedule_space.py``).
        num_trials: trials that the sampler proposes, over every launch; baselines come on top.
        objective: name of the value to optimise; its direction is the metric's own.
        objectives: several values instead, for a Pareto front.
        set: overrides that every trial shares.
        baselines: what to try first, so that the search never ends below the best known: overrides (``label`` names
            one), or ``stock`` for every solver preset with every stock grid.
        constraints: caps per sample on nfe, reward_calls, decodes (at planning) and device_s (as measured).
        racing: ``{start, factor, error, margin}``: trials start on few samples and grow only while they may still win;
            empty gives every trial all its samples.
        refine: further trials that refine the best one, coordinate by coordinate.
        held_out: samples on which the winner (or front) and the best baseline are measured again, at indices that the
            search never sees; 0 leaves that out.
        parallel: trials in flight at a time; with 1 the table of trials is reproducible on any executor.
        part: name of this part of the study.
    """

    space: dict[str, Any] = field(default_factory=dict)
    num_trials: int = 50
    objective: str = "quality/frechet"
    objectives: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)
    baselines: tuple[dict[str, Any], ...] | str = ()
    constraints: dict[str, Any] = field(default_factory=dict)
    racing: dict[str, Any] = field(default_factory=dict)
    refine: int = 0
    held_out: int = 2048
    parallel: int = 1
    part: str = ""

    races_proposals: ClassVar[bool] = True  # and not the baselines alone

    def __post_init__(self) -> None:
        check_space(self.space, self.name)  # type: ignore[attr-defined]
        for name, least in (("num_trials", 1), ("parallel", 1), ("refine", 0), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"search.{name} must be at least {least}, got {getattr(self, name)}.")
        if "schedule" not in self.space:
            Space(self.space)
        if isinstance(self.baselines, str) and self.baselines != "stock":
            raise unknown("search.baselines", self.baselines, ["stock"], "Allowed (or a list of overrides)")
        for key, value in self.constraints.items():
            if key not in CONSTRAINTS:
                raise unknown("search.constraints", key, list(CONSTRAINTS), "Allowed")
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"search.constraints.{key} must be a number of at least 0, got {value!r}.")
        if self.several and len(self.objectives) < 2:
            raise ValueError(f"search.objectives must name two values or more, got {list(self.objectives)}.")
        if self.several and (self.racing or self.refine):
            raise ValueError(
                "a race and a refinement need one objective: set objective, or leave racing and refine out."
            )
        Racing.from_data(self.racing)

    @property
    def several(self) -> bool:
        """Whether it looks for a Pareto front."""
        return bool(self.objectives)

    def targets(self) -> tuple[str, ...]:
        """The values to optimise."""
        return self.objectives or (self.objective,)

    def sampler(self, space: Space, seeds: Seeds, start: dict[str, Any] | None, context: SearchContext) -> Any:
        """Optuna's sampler for the next trial.

        Args:
            space: what it ranges over.
            seeds: of this trial, and of the whole search.
            start: parameters of the best baseline, if it is a point of the space.
        """
        raise NotImplementedError

    def start(self, context: SearchContext) -> Any:
        """Open or continue the Optuna study; its winners are measured again when it is over."""
        if not self.held_out:
            return OptunaSearch(self, context)
        from orchestrator.searches.confirm import Confirm

        inner = searches.describe(self)
        return Confirm(inner, self.objective, self.objectives, num_samples=self.held_out).start(context)
