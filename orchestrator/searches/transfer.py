"""A found schedule elsewhere: on another model, at another cost, under another guidance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.baselines import GRIDS
from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches
from orchestrator.searches.confirm import HELD_OUT
from orchestrator.searches.single import Listed
from tasks.adapt import moved, resampled
from tasks.schedule import SolverSchedule


@searches.register("transfer")
@dataclass(frozen=True)
class Transfer:
    """Measure a schedule on every combination of models, evaluations and guidances, beside the best known solvers.

    A schedule moves to another process by its log-SNR: a node at half log-SNR lambda goes to where the other process
    has it. It moves to another number of steps by reading its nodes as a curve over the fraction of steps done, and
    every step's choices from the step that covers the same fraction.

    Args:
        schedule: a schedule as data, or the path of a JSON file; left out, the study's own (``schedule=FILE``).
        models: names or specs; empty keeps the study's.
        nfes: numbers of evaluations; empty keeps the schedule's own.
        guidances: names or specs; empty keeps the study's.
        rivals: presets to compare with, each with every stock grid.
        num_samples: samples of every trial.
        first_index: where they start; by default where no search has looked.
        part: name of this part of the study.

    Reference: none needed.
    """

    schedule: dict[str, Any] | str | None = None
    models: tuple[Any, ...] = ()
    nfes: tuple[int, ...] = ()
    guidances: tuple[Any, ...] = ()
    rivals: tuple[str, ...] = ("dpmpp_2m", "unipc", "unipc_bh1", "deis", "velocity_2m")
    num_samples: int = 2048
    first_index: int = HELD_OUT
    part: str = "transfer"

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"search.num_samples must be at least 1, got {self.num_samples}.")
        for nfe in self.nfes:
            if not 1 <= nfe <= 64:
                raise ValueError(f"search.nfes must lie between 1 and 64, got {nfe}.")

    def start(self, context: SearchContext) -> Listed:
        """All combinations, the schedule first."""
        return Listed(list(self._proposals(context.recipe)))

    def _proposals(self, recipe: Any) -> Iterator[Proposal]:
        found = self._schedule(recipe)
        process = recipe.parts.model.noising
        models, guidances = self.models or (recipe.model,), self.guidances or (recipe.guidance,)
        extra = {"num_samples": self.num_samples, "first_index": self.first_index}
        for model, nfe, guidance in itertools.product(models, self.nfes or (found.nfe,), guidances):
            # A schedule replaces what the study had, so the solver is reset first: another process may not fit it.
            there = {"model": model, "guidance": guidance} | extra
            target = recipe.override({"model": model, "solver": "ddim", "times": "uniform", "guidance": guidance})
            there_process = target.parts.model.noising
            made = moved(resampled(found, nfe, process), process, there_process)
            yield Proposal(there | {"schedule": json.loads(made.to_json())}, self.part)
            for preset, grid in itertools.product(self.rivals, GRIDS):
                rival = {"solver": {"name": "unified", "preset": preset}, "times": grid, "nfe": nfe}
                try:
                    target.override(rival).check()
                except ValueError:
                    continue
                yield Proposal(there | rival, self.part, baseline=f"{preset}, {grid}, {nfe}")

    def _schedule(self, recipe: Any) -> SolverSchedule:
        if isinstance(self.schedule, str):
            from orchestrator.config import read_schedule

            return read_schedule(self.schedule)
        if self.schedule is not None:
            return SolverSchedule.from_data(self.schedule)
        solver, process = recipe.parts.solver, recipe.parts.model.noising
        if not hasattr(solver, "schedule"):
            raise ValueError(
                "search transfer needs a schedule. Set schedule=FILE, or search.schedule, to the JSON of a found one."
            )
        return solver.schedule(process, recipe.grid[0])
