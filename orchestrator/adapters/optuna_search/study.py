"""One Optuna study behind ask and tell: resumed exactly, shared by several launches, raced and constrained."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.adapters.optuna_search.leases import Leases
from orchestrator.adapters.optuna_search.storage import open_storage, patiently
from orchestrator.baselines import listed
from orchestrator.files import is_remote
from orchestrator.ports import EXTENT, Proposal, SearchContext
from orchestrator.racing import Race, Racing
from orchestrator.space import Axis, Space, label, points, same
from tasks import registry
from tasks.recipe import digest
from tasks.registry import unknown

log = logging.getLogger("solvus")

# User attributes of trials. Baselines, which no search proposed: name, what they override, the nearest point of the
# space. Others: on how many samples a value rests, why a trial was refused.
BASELINE, OVERRIDES, POINT = "solvus.baseline", "solvus.overrides", "solvus.point"
SAMPLES, REASON = "solvus.samples", "solvus.reason"
# How many proposals in a row may break a constraint before the search gives up.
MAX_REFUSED = 200


@dataclass(frozen=True)
class Seeds:
    """Seeds of one trial (a new one every time) and of the search that it belongs to."""

    trial: int
    search: int


@dataclass(frozen=True)
class Baseline:
    """A known schedule: its name, what it overrides, and the nearest point of the space, if there is one."""

    name: str
    overrides: dict[str, Any]
    point: dict[str, Any] | None
    is_exact: bool


def _refuse_gamed(targets: tuple[str, ...]) -> None:
    """A value that a degenerate sampler wins, such as perplexity, is no objective without what gives it away.

    Raises:
        ValueError: names the other value.
    """
    gamed: dict[str, str] = {}
    for name in registry.metrics.names():
        gamed |= getattr(registry.metrics.get(name), "gamed", {})
    for target in targets:
        if target in gamed and gamed[target] not in targets:
            raise ValueError(
                f"search objective {target} is won by a sampler that repeats the likeliest samples. Set "
                f"search.objectives=[{target}, {gamed[target]}], or optimise a distance to the data, such as "
                "quality/frechet."
            )


class OptunaSearch:
    """One Optuna study, asked and told; several launches may share it.

    A launch first proposes again, in order, every trial that the study already has: their rows are in the store, so
    they cost nothing, and the trial table comes out whole. A trial that an interrupted launch left RUNNING is finished
    with the parameters it has, once its lease has run out or its process is known to be dead; a trial that another
    living launch holds is left to it until its lease runs out. The sampler is seeded anew for every trial from its
    number, so a continued study proposes what an undisturbed one would have. A storage that is away is waited for.

    Raises:
        ValueError: an objective that no metric produces, a space or constraint that nothing can meet, a root without a
            place for the search.
    """

    def __init__(self, spec: Any, context: SearchContext) -> None:
        for objective in spec.targets():
            if objective not in context.better:
                raise unknown("objective", objective, sorted(context.better), "This study's metrics produce")
        _refuse_gamed(spec.targets())
        if context.storage is None and is_remote(context.root):
            raise ValueError(
                f"root {context.root} is no folder, so search {spec.name} needs storage=URL, for PostgreSQL."
            )
        self._spec, self._context = spec, context
        self._space = Space(spec.space, self._base(context))
        full = int(spec.set.get("num_samples", context.num_samples))
        settings, minimize = Racing.from_data(spec.racing), context.better[spec.targets()[0]] == "lower"
        cap = spec.constraints.get("device_s", math.inf)
        self._race = None if settings is None else Race(settings, spec.objective, minimize, full, cap)
        self._study: Any = None
        self._replay: list[Any] = []
        self._leases: Leases | None = None
        self._flying = 0

    def _base(self, context: SearchContext) -> Any:
        """The recipe with what all trials share, so that a schedule is laid over the right process."""
        if context.recipe is None:
            return None
        shared = {k: v for k, v in self._spec.set.items() if k not in EXTENT}
        return context.recipe.override(shared) if shared else context.recipe

    @property
    def name(self) -> str:
        """Study name in the storage; another space, metric or recipe is another study."""
        # These may change from launch to launch.
        fields = {k: v for k, v in vars(self._spec).items() if k not in ("num_trials", "parallel", "refine")}
        key = digest({"search": {"name": self._spec.name} | fields, "study": self._context.key})
        return f"{self._context.study}-{self._spec.part or self._spec.name}-{key[:8]}"

    @cached_property
    def baselines(self) -> list[Baseline]:
        """What is tried first."""
        recipe = self._base(self._context)
        nfes = self._space.nfes
        if self._spec.baselines == "stock" and not nfes:
            nfes = (recipe.nfe,)
        return [self._baseline(recipe, name, found) for name, found in listed(self._spec.baselines, recipe, nfes)]

    def _baseline(self, recipe: Any, name: str, overrides: dict[str, Any]) -> Baseline:
        if self._space.schedule is None:
            point = self._space.encode(overrides)
            exact = (
                point is not None
                and set(overrides) <= set(point)
                and all(same(point[path], value) for path, value in overrides.items())
            )
            return Baseline(name, overrides, point, exact)
        made = recipe.override(overrides)
        schedule = getattr(made.parts.solver, "schedule", None)
        if schedule is None or made.has_calibrated_times:
            return Baseline(name, overrides, None, False)
        wanted = schedule(made.parts.model.noising, made.grid[0])
        point = self._space.encode(overrides | {"schedule": json.loads(wanted.to_json())})
        exact = point is not None and self._space.schedule.equal(self._space.decode(point)["schedule"], wanted)
        return Baseline(name, overrides, point, exact)

    # --- ask ---------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        url = self._context.storage or f"sqlite:///{Path(self._context.root) / 'optuna.db'}"
        # Launches that begin at the same time make the same tables; the slower one finds them at its next try.
        racing = ("IntegrityError", "ProgrammingError")
        storage = patiently(lambda: open_storage(url), also=racing)
        better = self._context.better
        directions: Any = ["minimize" if better[name] == "lower" else "maximize" for name in self._spec.targets()]
        self._study = patiently(
            lambda: optuna.create_study(
                study_name=self.name, storage=storage, directions=directions, load_if_exists=True
            ),
            also=racing,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of objectives are marked experimental
            if not self._study.metric_names:
                patiently(lambda: self._study.set_metric_names(list(self._spec.targets())))
        wanted = [optuna.study.StudyDirection[d.upper()] for d in directions]
        if self._study.directions != wanted:
            raise ValueError(
                f"the search storage already has a study {self.name} with other objectives. Set another study name or "
                "storage."
            )
        self._replay = patiently(lambda: list(self._study.trials))
        self._leases = Leases(self._study)
        if not self._replay:
            for known in self.baselines:
                marks = {BASELINE: known.name, OVERRIDES: json.dumps(known.overrides)}
                if known.point is not None:
                    marks[POINT] = json.dumps(known.point)
                params = {k: label(v) for k, v in known.point.items()} if known.is_exact and known.point else {}
                patiently(partial(self._study.enqueue_trial, params, user_attrs=marks))

    def ask(self) -> Proposal | None:
        """The next trial, or None when the budget is spent or enough trials are in flight."""
        if self._flying >= self._spec.parallel:
            return None
        if self._study is None:
            self._open()
        proposal = self._again() or self._new() or self._reap()
        self._flying += proposal is not None
        return proposal

    def _again(self) -> Proposal | None:
        """The next trial of an earlier launch."""
        states = self._optuna.trial.TrialState
        while self._replay:
            trial = self._replay.pop(0)
            if trial.state == states.WAITING or REASON in trial.user_attrs:
                continue
            if trial.state == states.RUNNING:
                found = self._take_over(trial)
                if found is not None:
                    return found
                continue
            return self._proposal(trial.number, trial.state, trial, settled=True)
        return None

    def _take_over(self, trial: Any) -> Proposal | None:
        """A RUNNING trial whose launch is dead."""
        assert self._leases is not None
        if not self._leases.is_free(trial):
            return None
        try:
            found = self._proposal(trial.number, trial.state, trial)
        except (KeyError, ValueError):  # its launch died between asking and suggesting
            self._refuse(trial.number, trial._trial_id, "its launch died before it was complete")
            return None
        self._leases.take(trial)
        return found

    def _reap(self) -> Proposal | None:
        """When there is nothing new: a trial that another launch left behind since this one began."""
        running = (self._optuna.trial.TrialState.RUNNING,)
        for trial in patiently(lambda: self._study.get_trials(deepcopy=False, states=running)):
            found = self._take_over(trial)
            if found is not None:
                return found
        return None

    def _counted(self) -> tuple[list[Any], list[Any]]:
        """(trials that were asked for, those of them that used up the budget)."""
        waiting = self._optuna.trial.TrialState.WAITING
        asked = [t for t in patiently(lambda: self._study.get_trials(deepcopy=False)) if t.state != waiting]
        return asked, [t for t in asked if REASON not in t.user_attrs and BASELINE not in t.user_attrs]

    def _new(self) -> Proposal | None:
        """A trial that the sampler proposes."""
        assert self._leases is not None
        states = self._optuna.trial.TrialState
        budget = self._spec.num_trials + self._spec.refine
        for _ in range(MAX_REFUSED):
            asked, spent = self._counted()
            is_baseline = bool(patiently(lambda: self._study.get_trials(deepcopy=False, states=(states.WAITING,))))
            if not is_baseline and len(spent) >= budget:
                return None
            self._study.sampler = self._sampler(is_baseline, asked, spent)
            trial = patiently(self._study.ask)
            self._leases.take(trial)
            if BASELINE in trial.user_attrs:
                if any(t.user_attrs.get(BASELINE) == trial.user_attrs[BASELINE] for t in asked):
                    self._refuse(trial.number, trial._trial_id, "another launch asked for it too")
                    continue
                if fixed := self._study._storage.get_trial_system_attrs(trial._trial_id).get("fixed_params"):
                    self._walk(trial, fixed)
                return self._proposal(trial.number, states.RUNNING, trial)
            params, overrides = self._walk(trial)
            if sum(t.number < trial.number for t in self._counted()[1]) >= budget:
                self._refuse(trial.number, trial._trial_id, "another launch was quicker")
                return None
            if broken := self._breaks(overrides):
                self._refuse(trial.number, trial._trial_id, broken)
                continue
            return self._proposal(trial.number, states.RUNNING, trial)
        log.error("search %s: %d proposals in a row break its constraints; it ends here", self.name, MAX_REFUSED)
        return None

    def _walk(self, trial: Any, fixed: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Let Optuna suggest every axis that applies."""

        def suggest(axis: Axis) -> Any:
            if fixed is not None and axis.name not in fixed:
                raise KeyError(axis.name)
            if axis.choices is not None:
                chosen = patiently(lambda: trial.suggest_categorical(axis.name, [label(c) for c in axis.choices or ()]))
                return next(choice for choice in axis.choices if same(label(choice), chosen))
            if axis.is_whole:
                step = int(axis.step or 1)
                return patiently(lambda: trial.suggest_int(axis.name, axis.low, axis.high, log=axis.log, step=step))
            return patiently(lambda: trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log, step=axis.step))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # choices that are no plain values, a high that is no multiple of the step
            return self._space.walk(suggest)

    def _sampler(self, is_baseline: bool, asked: list[Any], spent: list[Any]) -> Any:
        seeds = Seeds(self._seed(f"/{len(asked)}"), self._seed(""))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of Optuna's samplers are marked experimental
            if is_baseline:
                return self._optuna.samplers.RandomSampler(seed=seeds.trial)
            if len(spent) >= self._spec.num_trials:
                from orchestrator.adapters.optuna_samplers import CoordinateSampler

                # What came up to the last trial of the search proper; baselines outside of the space have no place.
                last = spent[self._spec.num_trials - 1].number
                before = sum(t.number <= last and (bool(t.params) or BASELINE not in t.user_attrs) for t in asked)
                return CoordinateSampler(self._space, seeds.search, startup=before)
            return self._spec.sampler(self._space, seeds, self._best_baseline(asked), self._context)

    def _seed(self, more: str) -> int:
        digested = hashlib.sha256(f"{self._context.seed}/{self.name}{more}".encode()).digest()
        return int.from_bytes(digested[:4], "little")

    def _best_baseline(self, asked: list[Any]) -> dict[str, Any] | None:
        """The point of the best finished baseline."""
        if self._spec.several:
            return None
        done = [t for t in asked if POINT in t.user_attrs and t.values is not None]
        if not done:
            return None
        sign = 1 if self._context.better[self._spec.objective] == "lower" else -1
        best = min(done, key=lambda t: (sign * t.values[0], t.number))
        return json.loads(best.user_attrs[POINT])

    def _proposal(self, number: int, state: Any, trial: Any, settled: bool = False) -> Proposal:
        shared, name = dict(self._spec.set), trial.user_attrs.get(BASELINE, "")
        if name:
            overrides = shared | json.loads(trial.user_attrs[OVERRIDES])
        else:
            overrides = shared | self._space.decode(self._params(trial))
        race = self._race if name or self._spec.races_proposals else None
        if race is not None:
            overrides["num_samples"] = trial.user_attrs.get(SAMPLES, race.start) if settled else race.start
        return Proposal(overrides, self._spec.part, (number, state), race, settled, name)

    def _params(self, trial: Any) -> dict[str, Any]:
        """Optuna's parameters with choices as they were written."""
        found = {}
        for name, value in trial.params.items():
            axis = self._axes.get(name)
            found[name] = value
            if axis is not None and axis.choices is not None:
                found[name] = next(choice for choice in axis.choices if same(label(choice), value))
        return found

    @cached_property
    def _axes(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in self._space.axes}

    def _breaks(self, overrides: Mapping[str, Any]) -> str:
        """Why a proposal breaks a constraint; empty if it does not."""
        caps = {key: cap for key, cap in self._spec.constraints.items() if key != "device_s"}
        if not caps or self._context.recipe is None:
            return ""
        plain = {k: v for k, v in (self._spec.set | overrides).items() if k not in EXTENT}
        try:
            recipe = self._context.recipe.override(plain)
            spent = planned(recipe)
        except ValueError:
            return ""  # refused with its own words when it is planned
        for key, cap in caps.items():
            if spent[key] > cap:
                return f"{key} {spent[key]} is above the constraint {cap}"
        return ""

    # --- tell --------------------------------------------------------------------------------------------------------

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """Finish the trial in the storage; NaN and infinity never become a result, a late tell changes nothing."""
        self._flying -= 1
        number, state = proposal.handle
        if state != self._optuna.trial.TrialState.RUNNING:
            return
        assert self._leases is not None
        trial_id = self._leases.drop(number)
        found = None if values is None else [float(values[name]) for name in self._spec.targets()]
        if found is not None and not all(map(math.isfinite, found)):
            found = None
        cap = self._spec.constraints.get("device_s")
        if found is not None and cap is not None and values is not None and values.get("study/device_s", 0.0) > cap:
            log.warning("trial %d took %.3g device-seconds a sample, above the constraint %g", number,
                        values["study/device_s"], cap)  # fmt: skip
            found = None
        if found is not None and values is not None and self._race is not None and trial_id is not None:
            self._mark(trial_id, SAMPLES, int(values.get("study/num_samples", self._race.full)))
        self._finish(number, found)

    def _mark(self, trial_id: int, key: str, value: Any) -> None:
        def mark() -> None:
            try:
                self._study._storage.set_trial_user_attr(trial_id, key, value)
            except self._optuna.exceptions.UpdateFinishedTrialError:
                log.debug("trial %d was finished by another launch", trial_id)

        patiently(mark)

    def _refuse(self, number: int, trial_id: int, reason: str) -> None:
        """Fail a trial that never ran; it does not count."""
        assert self._leases is not None
        self._leases.drop(number)
        self._mark(trial_id, REASON, reason)
        self._finish(number, None)

    def _finish(self, number: int, values: list[float] | None) -> None:
        state = self._optuna.trial.TrialState.FAIL if values is None else None
        patiently(lambda: self._study.tell(number, values, state=state, skip_if_finished=True))

    # --- before and after --------------------------------------------------------------------------------------------

    def preview(self) -> Iterator[Proposal]:
        """The baselines, then the middle of the space as often as trials remain, each with all its samples.

        Raises:
            ValueError: constraints that nothing in the space meets.
        """
        self._check_feasible()
        shared = dict(self._spec.set)
        for known in self.baselines:
            yield Proposal(shared | known.overrides, self._spec.part, baseline=known.name)
        middle = Proposal(shared | self._space.decode(self._space.middle()), self._spec.part)
        for _ in range(self._spec.num_trials + self._spec.refine):
            yield middle

    def _check_feasible(self) -> None:
        if not self._spec.constraints or self._context.recipe is None:
            return
        reason = ""
        for params in [self._space.middle(), *points(self._space, np.random.default_rng(0), 200)]:
            reason = self._breaks(self._space.decode(params))
            if not reason:
                return
        raise ValueError(
            f"search.constraints {self._spec.constraints} can hardly be met: none of 200 points of the space does "
            f"({reason}). Raise the constraint or narrow the space."
        )

    def summary(self) -> list[dict[str, Any]]:
        """What came of it: the best trial and the importance of every parameter."""
        from orchestrator.adapters.optuna_search.importances import importances

        if self._study is None:
            return []
        done = [t for t in self._study.get_trials(deepcopy=False) if t.values is not None]
        return [
            {
                "part": self._spec.part,
                "search": self._spec.name,
                "optuna_study": self.name,
                "objectives": list(self._spec.targets()),
                "finished": len(done),
                "baselines": sum(BASELINE in t.user_attrs for t in done),
                "importances": [importances(self._study, i) for i in range(len(self._spec.targets()))],
                "racing": self._spec.racing,
            }
        ]


def planned(recipe: Any) -> dict[str, float]:
    """What one sample of a recipe is planned to cost."""
    account = recipe.account
    return {"nfe": account.nfe, "reward_calls": account.reward_calls, "decodes": account.decodes}
