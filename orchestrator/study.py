"""A study: a recipe plus a search. This module is the loop, and the plain data that it keeps."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.measure import measure, scorers
from orchestrator.plan import (
    ARTIFACTS,
    Shard,
    Work,
    aside,
    calibration,
    companions,
    covered,
    missing,
    shards,
    uncalibrated,
)
from orchestrator.ports import Executor, Proposal, Search, SearchContext, Tracker, WorkerLost
from orchestrator.registries import searches
from orchestrator.store import CorruptShard, Store
from orchestrator.worker import artifacts, calibrate, origin, perform
from tasks import registry
from tasks.calibration import bound
from tasks.noise import MAX_INDEX
from tasks.not_finite import NotFinite
from tasks.recipe import Recipe, digest, grid_of
from tasks.registry import Spec
from tasks.types import sample_shape

log = logging.getLogger("solvus")

# How often a trial is planned again because a stored file turned out to be damaged.
MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class Study:
    """What a user asked for, frozen.

    Attributes:
        name: its name; results lie in ``studies/NAME``.
        recipe: how a sample is made, before overrides.
        metrics: specs of metrics; ``cost`` is always among them.
        search: spec of the search.
        num_samples: samples of a trial.
        first_index: sample index at which they start.
        shard_size: samples of one unit of work.
        root: where everything is written.
        question: what the study is to answer, for people.
        reuse_gib: bound of the states that trials with equal beginnings share; 0 keeps none.
        group_by: what rows are alike in, for standard errors: a column of theirs, a number k for rows whose indices
            agree modulo k (as with k prompts), or None for independent rows.
        config: the composed configuration, as it was given.
    """

    name: str
    recipe: Recipe
    metrics: list[Spec]
    search: Spec
    num_samples: int
    shard_size: int
    root: str
    first_index: int = 0
    question: str = ""
    price_per_device_hour: float = 0.0
    storage: str | None = None
    reuse_gib: float = 0.0
    group_by: str | int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def model_revision(self) -> str:
        """Hash of the model's weights when the study began."""
        return self.recipe.parts.model.revision

    @property
    def better(self) -> dict[str, str]:
        """Which way is up, for every value that the metrics produce."""
        found: dict[str, str] = {}
        for spec in self.metrics:
            found |= registry.metrics.build(spec).better
        return found

    @property
    def goal(self) -> tuple[str, str] | None:
        """The value by which people ask what is best, and which way is up: the search's objective, or a quality."""
        better = self.better
        names = [*_objectives(self.search), *(name for name in better if name.startswith("quality/")), *better]
        return next(((name, better[name]) for name in names if name in better), None)

    def context(self) -> SearchContext:
        """What the search may know."""
        _ = self.model_revision  # pinned from here on
        key = digest({"recipe": self.recipe.key, "metrics": self.metrics, "num_samples": self.num_samples})
        return SearchContext(
            self.name, key, self.recipe.seed, self.root, self.storage, self.better, self.recipe, self.num_samples,
            self.first_index, self.metrics,
        )  # fmt: skip

    def trial(self, number: int, proposal: Proposal) -> Trial:
        """The trial that a proposal means, checked.

        Raises:
            ValueError: it cannot run.
        """
        overrides = dict(proposal.overrides)
        count = overrides.pop("num_samples", self.num_samples)
        first = overrides.pop("first_index", self.first_index)
        for name, value in (("num_samples", count), ("first_index", first)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
        if count < 1:
            raise ValueError(f"num_samples must be at least 1, got {count}.")
        recipe = self.recipe.override(overrides)
        if recipe.model == self.recipe.model and recipe.parts.model.revision != self.model_revision:
            raise ValueError(
                f"the weights of model {recipe.model['name']} changed while the study ran: revision "
                f"{self.model_revision} became {recipe.parts.model.revision}. Run the study again."
            )
        trial = Trial(number, proposal, recipe, first, count)
        if not 0 <= first <= MAX_INDEX - count:
            raise ValueError(f"sample indices [{first}, {first + count}) must lie in [0, {MAX_INDEX}).")
        recipe.check()
        model = recipe.parts.model
        self._check_groups(recipe, count)
        for spec in self.metrics:
            plugin = registry.metrics.build(spec)
            for need in plugin.needs():
                scorer = recipe.scorer(need)
                scorer.check(sample_shape(model))
                if hasattr(scorer, "check_model"):
                    scorer.check_model(model)
                if scorer.needs_labels and not recipe.has_labels:
                    raise ValueError(f"metric {spec['name']} needs labels, but this study has none. Leave it out.")
                self._check_companion(recipe, spec["name"], need)
            plugin.check(model, count)
            if hasattr(plugin, "check_recipe"):
                plugin.check_recipe(recipe)
        return trial

    def _check_groups(self, recipe: Recipe, count: int) -> None:
        """Refuse clusters of which there are not two."""
        if self.group_by is None:
            return
        if self.group_by == "label" and not recipe.has_labels:
            raise ValueError("group_by=label needs labels, but this study has none. Set group_by=null.")
        single = isinstance(recipe.labels, int) or recipe.parts.model.num_classes < 2
        if count < 2 or (self.group_by == "label" and single):
            raise ValueError(
                f"group_by={self.group_by} makes one cluster of all {count} samples, which has no standard error. Set "
                "group_by=null or raise num_samples."
            )

    @staticmethod
    def _check_companion(recipe: Recipe, metric: str, need: Spec) -> None:
        """Refuse a metric that compares with rows which cannot be made, or that is not meant to compare rows."""
        if (other := recipe.companion(need)) is None:
            return
        if not getattr(registry.metrics.get(metric), "paired", False):
            raise ValueError(
                f"metric {metric} cannot read {need['name']}, which compares a sample with another one and not with "
                "data. Use metric trajectory."
            )
        try:
            other.check()
        except ValueError as error:
            raise ValueError(f"what metric {metric} compares with cannot be sampled: {error}") from None


@dataclass
class Trial:
    """One point of a study: the recipe with overrides, on a range of sample indices, and what came of it."""

    number: int
    proposal: Proposal
    recipe: Recipe
    first_index: int
    num_samples: int
    state: str = "running"
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    quarantined: dict[int, str] = field(default_factory=dict)
    times: list[float] | None = None
    looks: list[Any] = field(default_factory=list)
    stopped: bool = False
    estimate: float | None = None
    open_shards: int = 0
    attempts: int = 0
    counted: int = 0
    had: int = 0  # samples that the store had when they were first asked for
    announced: bool = False
    damaged: bool = False
    ahead: frozenset[str] = frozenset()  # keys of the companion rows that are being made for it
    rounds: int = 0  # how often they were, since it last got on

    @property
    def part(self) -> str:
        """The part of the study that it belongs to."""
        return self.proposal.part

    @property
    def stop(self) -> int:
        """One past its last sample index."""
        return self.first_index + self.num_samples

    @property
    def nfe(self) -> float:
        """Network evaluations of one sample: as planned, or what rows really cost where that is decided on the way."""
        return self.recipe.nfe if self.recipe.account.exact else self.values.get("cost/nfe", self.recipe.nfe)

    @property
    def seconds(self) -> float | None:
        """Device-seconds of one sample, by whoever made it; None where no rows are there."""
        return self.cost["generate_s"] / self.num_samples if self.cost.get("generate_s") else None

    @property
    def told(self) -> dict[str, float]:
        """What its search is told: values on all samples, estimated where a race stopped it, and what it rests on."""
        work = {"cost/work": self.values["cost/nfe"]} if "cost/nfe" in self.values else {}
        told = work | self.values | {"study/num_samples": float(self.num_samples)}
        if self.num_samples and self.cost.get("generate_s") is not None:
            told["study/device_s"] = self.cost["generate_s"] / self.num_samples
        return told if self.estimate is None else told | {self.proposal.race.objective: self.estimate}

    @property
    def identity(self) -> str:
        """The same for the same rows in the same part."""
        if self.num_samples == 0:  # it never ran: known by what was asked for
            return f"{self.part}/refused/{digest(dict(self.proposal.overrides))}"
        return f"{self.part}/{self.recipe.key}/{self.first_index}-{self.stop}"

    @property
    def title(self) -> str:
        """A line for people."""
        changed = ", ".join(f"{path}={_short(value)}" for path, value in self.proposal.overrides.items())
        return f"#{self.number} {self.part} {changed or 'as configured'}".replace("  ", " ")

    def described(self) -> dict[str, Any]:
        """Recipe and range as plain data."""
        r = self.recipe
        specs = {"model": r.model, "solver": r.solver, "times": r.times, "guidance": r.guidance, "strategy": r.strategy}
        if r.initial["name"] != "prior":
            specs["initial"] = r.initial
        plain = {"batch_size": r.batch_size, "seed": r.seed, "dtype": r.dtype, "device": r.device, "nfe": r.nfe}
        reward = {} if r.reward is None else {"reward": r.reward}
        plain |= {"work": r.work} if r.masks else {}
        return specs | reward | plain | {"num_samples": self.num_samples, "first_index": self.first_index}

    def fingerprint(self) -> str:
        """Changes when the result does."""
        return digest([self.state, self.values, self.errors])


def _objectives(spec: Mapping[str, Any]) -> list[str]:
    """The objectives of a search and of those inside it."""
    spec = searches.complete(dict(spec))
    own = spec.get("objectives") or [spec.get("objective")]
    inside = [part for part in [*(spec.get("parts") or ()), spec.get("inner")] if part]
    return [name for name in own if name] + [name for part in inside for name in _objectives(part)]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = value.get("config") or {}
        return f"{value.get('scheduler', value.get('name'))}{json.dumps(inner) if inner else ''}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(
    study: Study,
    executor: Executor,
    store: Store,
    tracker: Tracker,
    watch: Any,
    ledger: Ledger,
    trials: list[Trial],
) -> list[dict[str, Any]]:
    """Ask, plan, submit, measure, tell, until the search has nothing more and nothing is in flight.

    Trials are added to ``trials`` as they are proposed, so that an interrupted launch has its table too.

    Returns:
        the search's own account: one mapping for each search inside.
    """
    search: Search = searches.build(study.search).start(study.context())
    loop = _Loop(study, search, store, tracker, watch, ledger, trials)
    flying: dict[Future, tuple[Trial, Shard]] = {}
    while True:
        while not loop.backlog and len(flying) < executor.slots and (proposal := search.ask()) is not None:
            try:
                loop.plan(study.trial(len(loop.trials), proposal))
            except ValueError as error:  # foreseeable trials were checked before; this one a search came upon
                loop.refuse(proposal, error)
        while loop.backlog and len(flying) < executor.slots:
            trial, shard = loop.backlog.take()
            flying[executor.submit(calibrate if shard.calibrates else perform, shard)] = (trial, shard)
        if not flying and not loop.backlog:
            return search.summary() if hasattr(search, "summary") else []
        for future in wait(flying, timeout=1.0, return_when=FIRST_COMPLETED).done:
            loop.settle(*flying.pop(future), future)
        watch.tick()


class Backlog:
    """Shards that wait, cut from their plans only when they are needed, so that a million of them take no memory."""

    def __init__(self) -> None:
        self._streams: deque[Iterator[tuple[Trial, Shard]]] = deque()
        self._head: tuple[Trial, Shard] | None = None

    def add(self, items: Iterable[tuple[Trial, Shard]], first: bool = False) -> None:
        """Append shards, or put them before all others."""
        if first:
            held = [] if self._head is None else [self._head]
            self._head = None
            self._streams.appendleft(chain(items, held))
        else:
            self._streams.append(iter(items))

    def __bool__(self) -> bool:
        while self._head is None and self._streams:
            self._head = next(self._streams[0], None)
            if self._head is None:
                self._streams.popleft()
        return self._head is not None

    def take(self) -> tuple[Trial, Shard]:
        """The next shard; there must be one."""
        assert self
        head, self._head = self._head, None
        assert head is not None
        return head


@dataclass
class _Loop:
    """What the loop above remembers between two turns."""

    study: Study
    search: Search
    store: Store
    tracker: Tracker
    watch: Any
    ledger: Ledger
    trials: list[Trial]
    backlog: Backlog = field(default_factory=Backlog)
    calibrating: set[str] = field(default_factory=set)
    accompanying: set[str] = field(default_factory=set)
    waiting: list[Trial] = field(default_factory=list)

    def plan(self, trial: Trial) -> None:
        """Put a trial's missing shards into the queue, or finish it if there are none.

        Calibrations come first, then the rows of other recipes that its scorers compare with.
        """
        if not trial.announced:
            trial.announced = True
            self.trials.append(trial)
            self.watch.began(trial)
        if missing := uncalibrated(trial.recipe, self.store):
            return self.prepare(trial, missing)
        needs = scorers(self.study.metrics)
        span = (trial.first_index, trial.stop, self.study.shard_size, self.store)
        if ahead := companions(trial.recipe, needs, *span):
            return self.accompany(trial, ahead)
        trial.rounds = 0
        trial.attempts += 1
        self._keep(trial.recipe.key, asdict(trial.recipe))
        work = shards(trial.recipe, needs, *span, int(self.study.reuse_gib * 2**30))
        self._queue(trial, work)
        if not work:
            self.finish(trial)

    def _keep(self, key: str, recipe: dict[str, Any]) -> None:
        if self.store.get_json("recipes", key) is None:
            self.store.put_json("recipes", key, recipe)

    def _queue(self, trial: Trial, work: Work) -> None:
        trial.open_shards = len(work)
        self.watch.planned(trial, work)
        self.backlog.add((trial, shard) for shard in work)

    def accompany(self, trial: Trial, work: Work) -> None:
        """Have the rows made that a trial's are compared with, or wait for another trial that has them made already."""
        keys = {piece.key: piece.recipe for piece in work.pieces}
        if self.accompanying & set(keys):
            self.waiting.append(trial)
            return
        trial.rounds += 1
        if trial.rounds > MAX_ATTEMPTS:
            trial.reason = f"its companion rows were made {MAX_ATTEMPTS} times, and the store still lacks some"
            log.error("%s: %s", trial.title, trial.reason)
            return self.finish(trial)
        for key, recipe in keys.items():
            self._keep(key, recipe)
        trial.ahead = frozenset(keys)
        self.accompanying |= trial.ahead
        self._queue(trial, work)

    def accompanied(self, trial: Trial) -> None:
        """Go on with a trial whose companion rows were made, and with those that waited for them."""
        self.accompanying -= trial.ahead
        trial.ahead, trial.damaged = frozenset(), False
        if trial.reason:
            self.finish(trial)
        else:
            self.plan(trial)
        self.resume()

    def resume(self) -> None:
        """Plan the trials again that waited for something."""
        waiting, self.waiting = self.waiting, []
        for other in waiting:
            self.plan(other)

    def prepare(self, trial: Trial, missing: list[str]) -> None:
        """Have a trial's artifacts made, or wait for another trial that has some of them made already."""
        if self.calibrating & set(missing):
            self.waiting.append(trial)
            return
        self.calibrating |= set(missing)
        self.backlog.add([(trial, calibration(trial.recipe, self.store))], first=True)

    def prepared(self, trial: Trial, shard: Shard, error: BaseException | None) -> None:
        """Go on with a trial whose artifacts were made, and with those that waited for them."""
        self.calibrating -= {c.key for c in trial.recipe.calibrations}
        if error is None:
            self.plan(trial)
        else:
            trial.reason = f"calibration failed: {type(error).__name__}: {error}"
            log.error("%s: %s", trial.title, trial.reason)
            self.finish(trial)
        self.resume()

    def refuse(self, proposal: Proposal, error: ValueError) -> None:
        """Note a proposal that cannot run as a failed trial, and go on."""
        trial = Trial(len(self.trials), proposal, self.study.recipe, 0, 0, state="failed", reason=str(error))
        log.error("%s cannot run: %s", trial.title, error)
        self.trials.append(trial)
        self.watch.began(trial)
        self.search.tell(proposal, None)
        self.tracker.log(trial)
        self.watch.ended(trial)

    def settle(self, trial: Trial, shard: Shard, future: Future) -> None:
        """Account for a shard that ended one way or the other."""
        error = future.exception()
        if shard.calibrates:
            if error is None:
                self.ledger.add(future.result())
            return self.prepared(trial, shard, error)
        trial.open_shards -= 1
        if error is not None:
            self.watch.lost(trial, shard, error)
        if error is None:
            self.ledger.add(future.result())
            self.watch.made(trial, shard, future.result())
        elif isinstance(error, CorruptShard):
            log.warning("%s", error)
            trial.damaged = True
        elif isinstance(error, WorkerLost) and shard.stop - shard.start > 1:
            log.warning("shard %s kills its workers; looking for the row that does", shard.name)
            trial.open_shards += 2
            self.backlog.add(((trial, half) for half in shard.halves()), first=True)
        elif isinstance(error, WorkerLost):
            log.error("row %d of %s kills its worker; it is set aside: %s", shard.start, shard.key, error)
            self.store.quarantine(shard.key, shard.start, str(error))
        elif isinstance(error, NotFinite):
            log.error("%s They are set aside.", error)
            for row, why in error.rows.items():
                self.store.quarantine(shard.key, row, f"not finite: {why}")
            rest = missing(shard.start, shard.stop, covered([], error.rows))
            trial.open_shards += len(rest)
            pieces = [replace(shard, start=low, stop=high) for low, high in rest]
            self.backlog.add(((trial, piece) for piece in pieces), first=True)
        else:
            kind = "companion shard" if trial.ahead else "shard"
            reason = f"{kind} {shard.name} failed: {type(error).__name__}: {error}"
            log.error("%s. Reproduce here: solvus shard %s root=%s", reason, shard.name, shard.root)
            trial.reason = trial.reason or reason
        if trial.open_shards == 0:
            self.accompanied(trial) if trial.ahead else self.finish(trial)

    def _times(self, trial: Trial) -> list[float]:
        """The grid of a trial whose calibrations are done; empty if they failed."""
        if uncalibrated(trial.recipe, self.store):
            return []
        parts = bound(trial.recipe, artifacts(trial.recipe, self.store))
        return list(grid_of(parts)[0])

    def finish(self, trial: Trial) -> None:
        """Measure a trial whose shards are done, tell the search and the tracker."""
        if trial.damaged and trial.attempts < MAX_ATTEMPTS:
            trial.damaged = False
            return self.plan(trial)
        more = None
        if not trial.reason:
            try:
                trial.values, trial.errors = measure(
                    trial.recipe, self.study.metrics, trial.first_index, trial.stop, self.store, self.study.group_by
                )
                if trial.proposal.race is not None:
                    more = trial.proposal.race.look(trial, self.study.metrics, self.store, self.study.group_by)
            except CorruptShard as error:
                log.warning("%s", error)
                if trial.attempts < MAX_ATTEMPTS:
                    return self.plan(trial)
                trial.reason = str(error)
            except (ValueError, KeyError) as error:
                trial.reason = f"measuring failed: {error}"
                log.error("%s: %s", trial.title, trial.reason)
        if more is not None:
            trial.num_samples, trial.attempts, trial.rounds = more, 0, 0
            return self.plan(trial)
        without = aside(trial.recipe, scorers(self.study.metrics), self.store)
        trial.quarantined = {i: why for i, why in without.items() if trial.first_index <= i < trial.stop}
        trial.state = "failed" if trial.reason else "degraded" if trial.quarantined else "complete"
        trial.cost = self.ledger.cost_of(trial.recipe, trial.first_index, trial.stop, self.store)
        trial.commit = origin()["commit"]
        cap = trial.recipe.parts.strategy.budget.get("seconds")
        if trial.state != "failed" and cap is not None and (trial.seconds or 0.0) > cap:
            trial.state, trial.reason = (
                "failed",
                (
                    f"its samples took {trial.seconds:.3g} device-seconds each, above strategy.budget.seconds={cap:g}. "
                    "Raise it, or use fewer steps or candidates."
                ),
            )
            log.error("%s: %s", trial.title, trial.reason)
        if trial.recipe.calibrations:
            kept = [self.store.get_json(ARTIFACTS, c.key) or {} for c in trial.recipe.calibrations]
            trial.cost["calibration_nfe"] = float(sum(meta.get("cost", {}).get("nfe", 0) for meta in kept))
            trial.times = self._times(trial)
        self.search.tell(trial.proposal, None if trial.state == "failed" else trial.told)
        self.tracker.log(trial)
        self.watch.ended(trial)
