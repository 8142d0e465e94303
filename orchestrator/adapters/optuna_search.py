"""Optuna's samplers as searches: ask, tell, resume."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.files import is_remote
from orchestrator.ports import Proposal, SearchContext
from orchestrator.registries import searches
from orchestrator.results import is_alive
from orchestrator.searches.single import check_space
from tasks.recipe import digest
from tasks.registry import unknown

log = logging.getLogger("solvus")


@searches.register("tpe")
@dataclass(frozen=True)
class TPE:
    """Tree-structured Parzen estimator, by Optuna; visible as an Optuna study and resumed from it.

    Args:
        space: dotted path -> ``{low, high}`` (with ``log: true`` or ``step``), or a list of choices.
        num_trials: trials in all, over every launch.
        objective: name of the value to optimise; its direction is the metric's own.
        set: overrides that every trial shares.
        baselines: points of the space to try first, so that the search never ends below the best known one.
        num_startup_trials: random trials before the estimator takes over.
        parallel: trials in flight at a time; with 1 the table of trials is reproducible on any executor.
        part: name of this part of the study.

    Reference: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; Akiba et al. 2019 (Optuna).
    """

    space: dict[str, Any] = field(default_factory=dict)
    num_trials: int = 50
    objective: str = "quality/frechet"
    set: dict[str, Any] = field(default_factory=dict)
    baselines: tuple[dict[str, Any], ...] = ()
    num_startup_trials: int = 10
    parallel: int = 1
    part: str = ""

    def __post_init__(self) -> None:
        _check(self, "tpe")

    def start(self, context: SearchContext) -> OptunaSearch:
        """Open or continue the Optuna study."""

        def sampler(optuna: Any, seed: int) -> Any:
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.num_startup_trials, multivariate=True)

        return OptunaSearch(self, context, sampler)


@searches.register("random")
@dataclass(frozen=True)
class Random:
    """Uniform random search, by Optuna: the baseline of every other search.

    Args:
        space: dotted path -> ``{low, high}`` (with ``log: true`` or ``step``), or a list of choices.
        num_trials: trials in all, over every launch.
        objective: name of the value to optimise; its direction is the metric's own.
        set: overrides that every trial shares.
        baselines: points of the space to try first.
        parallel: trials in flight at a time; with 1 the table of trials is reproducible on any executor.
        part: name of this part of the study.

    Reference: Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization".
    """

    space: dict[str, Any] = field(default_factory=dict)
    num_trials: int = 50
    objective: str = "quality/frechet"
    set: dict[str, Any] = field(default_factory=dict)
    baselines: tuple[dict[str, Any], ...] = ()
    parallel: int = 1
    part: str = ""

    def __post_init__(self) -> None:
        _check(self, "random")

    def start(self, context: SearchContext) -> OptunaSearch:
        """Open or continue the Optuna study."""
        return OptunaSearch(self, context, lambda optuna, seed: optuna.samplers.RandomSampler(seed=seed))


def _check(spec: Any, name: str) -> None:
    check_space(spec.space, name)
    if spec.num_trials < 1:
        raise ValueError(f"search.num_trials must be at least 1, got {spec.num_trials}.")
    if spec.parallel < 1:
        raise ValueError(f"search.parallel must be at least 1, got {spec.parallel}.")
    for path, axis in spec.space.items():
        if isinstance(axis, list) and axis:
            continue
        if not isinstance(axis, Mapping) or not {"low", "high"} <= set(axis) <= {"low", "high", "log", "step"}:
            raise ValueError(
                f"search.space.{path} must be a list of choices or {{low, high[, log, step]}}, got {axis!r}."
            )
        for end in ("low", "high", "step"):
            value = axis.get(end)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number and not (end == "step" and value is None):
                raise ValueError(f"search.space.{path}.{end} must be a number, got {value!r}.")
        if not axis["low"] <= axis["high"]:
            raise ValueError(f"search.space.{path} is empty: low {axis['low']} is above high {axis['high']}.")
        if axis.get("log") and (axis["low"] <= 0 or axis.get("step") is not None):
            raise ValueError(f"search.space.{path}: log needs low above 0 and no step, got {axis!r}.")
        if axis.get("step") is not None and axis["step"] <= 0:
            raise ValueError(f"search.space.{path}.step must be above 0, got {axis['step']!r}.")
    for point in spec.baselines:
        if set(point) != set(spec.space):
            raise ValueError(
                f"a baseline must give every path of the space, {sorted(spec.space)}, got {sorted(point)}."
            )


class OptunaSearch:
    """One Optuna study, asked and told; several launches may share it.

    A launch first proposes again, in order, every trial that the study already has: their rows are in the store, so
    they cost nothing, and the trial table comes out whole. A trial that an interrupted launch left RUNNING is finished
    with the parameters it has, once its lease has run out or its process is known to be dead; a trial that another
    living launch holds is left to it. The sampler is seeded anew for every trial from its number, so a continued study
    proposes what an undisturbed one would have. A storage that is away is waited for.
    """

    def __init__(self, spec: Any, context: SearchContext, sampler: Any) -> None:
        if spec.objective not in context.better:
            raise unknown("objective", spec.objective, sorted(context.better), "This study's metrics produce")
        if context.storage is None and is_remote(context.root):
            raise ValueError(
                f"root {context.root} is no folder, so search {spec.name} needs storage=URL, for PostgreSQL."
            )
        self._spec, self._context, self._make = spec, context, sampler
        self._direction: Any = "minimize" if context.better[spec.objective] == "lower" else "maximize"
        self._study: Any = None
        self._replay: list[Any] = []
        self._leases: Leases | None = None
        self._flying = 0

    @property
    def name(self) -> str:
        """Study name in the storage; another space, metric or recipe is another study."""
        fields = {
            key: value for key, value in vars(self._spec).items() if key not in ("num_trials", "parallel")
        }  # both may change
        key = digest({"search": {"name": self._spec.name} | fields, "study": self._context.key})
        return f"{self._context.study}-{self._spec.part or self._spec.name}-{key[:8]}"

    def _open(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        url = self._context.storage or f"sqlite:///{Path(self._context.root) / 'optuna.db'}"
        self._study = _patiently(
            lambda: optuna.create_study(
                study_name=self.name, storage=url, direction=self._direction, load_if_exists=True
            ),
            # Launches that begin at the same time make the same tables; the slower one finds them at its next try.
            also=("IntegrityError", "ProgrammingError"),
        )
        self._replay = _patiently(lambda: list(self._study.trials))
        self._leases = Leases(self._study)
        if not self._replay:
            for point in self._spec.baselines:
                labels = {path: _label(value) for path, value in point.items()}
                _patiently(partial(self._study.enqueue_trial, labels, skip_if_exists=True))

    def _distributions(self) -> dict[str, Any]:
        distributions = self._optuna.distributions
        found = {}
        for path, axis in self._spec.space.items():
            if isinstance(axis, list):
                found[path] = distributions.CategoricalDistribution([_label(value) for value in axis])
            elif isinstance(axis["low"], int) and isinstance(axis["high"], int):
                found[path] = distributions.IntDistribution(
                    axis["low"], axis["high"], log=axis.get("log", False), step=axis.get("step", 1)
                )
            else:
                found[path] = distributions.FloatDistribution(
                    float(axis["low"]), float(axis["high"]), log=axis.get("log", False), step=axis.get("step")
                )
        return found

    def ask(self) -> Proposal | None:
        """The next trial, or None when the budget is spent or enough trials are in flight."""
        if self._flying >= self._spec.parallel:
            return None
        proposal = self._next()
        self._flying += proposal is not None
        return proposal

    def _next(self) -> Proposal | None:
        if self._study is None:
            self._open()
        assert self._leases is not None
        states = self._optuna.trial.TrialState
        while self._replay:
            trial = self._replay.pop(0)
            if trial.state == states.WAITING:
                continue  # the next new ask takes it
            if trial.state == states.RUNNING:
                if not self._leases.is_free(trial):
                    continue
                if set(trial.params) != set(self._spec.space):  # its launch died between asking and suggesting
                    self._finish(trial.number, None)
                    continue
                self._leases.take(trial)
            return Proposal(self._overrides(trial.params), self._spec.part, (trial.number, trial.state))
        asked = [t for t in _patiently(lambda: self._study.get_trials(deepcopy=False)) if t.state != states.WAITING]
        if len(asked) >= self._spec.num_trials:
            return None
        seed = hashlib.sha256(f"{self._context.seed}/{self.name}/{len(asked)}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate TPE is marked experimental
            self._study.sampler = self._make(self._optuna, int.from_bytes(seed[:4], "little"))
        trial = _patiently(lambda: self._study.ask(self._distributions()))
        if trial.number >= self._spec.num_trials:  # another launch was quicker
            self._finish(trial.number, None)
            return None
        self._leases.take(trial)
        return Proposal(self._overrides(trial.params), self._spec.part, (trial.number, states.RUNNING))

    def _overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        overrides = dict(self._spec.set)
        for path, axis in self._spec.space.items():
            value = params[path]
            overrides[path] = next(v for v in axis if _label(v) == value) if isinstance(axis, list) else value
        return overrides

    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None:
        """Finish the trial in the storage; NaN and infinity never become a result, a late tell changes nothing."""
        self._flying -= 1
        number, state = proposal.handle
        if state == self._optuna.trial.TrialState.RUNNING:
            assert self._leases is not None
            self._leases.drop(number)
            value = None if values is None else values[self._spec.objective]
            self._finish(number, value if value is not None and math.isfinite(value) else None)

    def _finish(self, number: int, value: float | None) -> None:
        state = self._optuna.trial.TrialState.FAIL if value is None else None
        _patiently(lambda: self._study.tell(number, value, state=state, skip_if_finished=True))

    def preview(self) -> Iterator[Proposal]:
        """The baselines, then the middle of the space as often as trials remain."""
        middle = {}
        for path, axis in self._spec.space.items():
            if isinstance(axis, list):
                middle[path] = axis[0]
            else:
                whole = isinstance(axis["low"], int) and isinstance(axis["high"], int)
                middle[path] = (axis["low"] + axis["high"]) // 2 if whole else (axis["low"] + axis["high"]) / 2
        points = [*self._spec.baselines][: self._spec.num_trials]
        points += [middle] * (self._spec.num_trials - len(points))
        for point in points:
            yield Proposal(dict(self._spec.set) | dict(point), self._spec.part)


class Leases:
    """Who works on which trial: a mark with an owner and an end, renewed by a thread while its owner lives."""

    ATTRIBUTE = "solvus.lease"
    GRACE_S = 15.0  # between asking for a trial and marking it

    def __init__(self, study: Any, lease_s: float = 120.0) -> None:
        self._study, self._lease_s = study, lease_s
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "launch": uuid.uuid4().hex}
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._thread.start()

    def is_free(self, trial: Any) -> bool:
        """Whether nobody alive holds this RUNNING trial."""
        lease = trial.user_attrs.get(self.ATTRIBUTE)
        if lease is None:  # its launch marks it next, unless it died in between
            return time.time() - trial.datetime_start.timestamp() > self.GRACE_S
        if lease["until"] < time.time():
            return True
        if lease["host"] == self._owner["host"] and lease["launch"] != self._owner["launch"]:
            return not is_alive(lease["pid"]) or lease["pid"] == self._owner["pid"]
        return False

    def take(self, trial: Any) -> None:
        """Hold a trial from now on."""
        with self._lock:
            self._held[trial.number] = trial._trial_id
        self._mark(trial._trial_id)

    def drop(self, number: int) -> None:
        """Let go of a trial."""
        with self._lock:
            self._held.pop(number, None)

    def _mark(self, trial_id: int) -> None:
        lease = self._owner | {"until": time.time() + self._lease_s}
        _patiently(lambda: self._study._storage.set_trial_user_attr(trial_id, self.ATTRIBUTE, lease))

    def _renew(self) -> None:
        while True:
            time.sleep(self._lease_s / 4)
            with self._lock:
                held = list(self._held.values())
            for trial_id in held:
                try:
                    self._mark(trial_id)
                except Exception as error:  # a finished trial takes no marks, a dead storage is somebody else's news
                    log.debug("lease of trial %s not renewed: %s", trial_id, error)


def _patiently(call: Callable[[], Any], patience_s: float = 900.0, also: tuple[str, ...] = ()) -> Any:
    """Call the storage; while it is locked or away, try again (on the errors ``also`` for half a minute)."""
    began, wait = time.monotonic(), 0.2
    while True:
        try:
            return call()
        except Exception as error:
            names = {cls.__name__ for cls in type(error).__mro__}
            names |= {cls.__name__ for cls in type(error.__cause__).__mro__}
            away = names & {"OperationalError", "StorageInternalError", "InterfaceError", "DisconnectionError"}
            limit = patience_s if away else 30.0 if names & set(also) else 0.0
            if time.monotonic() - began + wait > limit:
                raise
            log.warning("the search storage is away, trying again in %.1f s: %s", wait, str(error).splitlines()[0])
            time.sleep(wait)
            wait = min(2 * wait, 15.0)


def _label(value: Any) -> Any:
    """A choice as Optuna stores it: plain values as they are, specs as text."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value
