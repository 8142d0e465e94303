"""The loop of a study: ask, plan, submit, measure, tell, until nothing is left and nothing is in flight."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.measure import measure, scorers
from orchestrator.origin import origin
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
from orchestrator.ports import Executor, ExecutorLost, Proposal, Search, Tracker, WorkerLost
from orchestrator.registries import searches
from orchestrator.store import CorruptShard, Store
from orchestrator.study import Study
from orchestrator.trial import Trial
from orchestrator.worker import artifacts, calibrate, perform
from tasks.calibration import bound
from tasks.not_finite import NotFinite, advice
from tasks.recipe import grid_of

log = logging.getLogger("solvus")

# How often a trial is planned again because a stored file turned out to be damaged.
MAX_ATTEMPTS = 4
MOST_LOST = 0.5  # share of a trial's rows that may be lost


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
        """Account for a shard that ended one way or the other.

        Raises:
            ExecutorLost: so did everything else; no trial failed for that.
        """
        error = future.exception()
        if isinstance(error, ExecutorLost):
            raise error
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
            log.error("%s", error)
            aside_now = {row: f"not finite: {why}" for row, why in error.rows.items()}
            if trial.ahead:
                self._set_aside(shard.key, aside_now)
            else:
                trial.lost |= aside_now
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

    def _set_aside(self, key: str, rows: Mapping[int, str]) -> None:
        for row, why in rows.items():
            self.store.quarantine(key, row, why)

    def _lose(self, trial: Trial) -> None:
        """Put rows that a trial lost into quarantine; one that lost most fails, and its rows may be tried again.

        What a few survivors say of a sampler that diverges would mislead a search.
        """
        span = range(trial.first_index, trial.stop)
        known = aside(trial.recipe, scorers(self.study.metrics), self.store)
        gone = {i: why for i, why in sorted((trial.lost | known).items()) if i in span}
        if len(gone) <= MOST_LOST * len(span):
            self._set_aside(trial.recipe.key, trial.lost)
        elif not trial.reason:
            first, why = next(iter(gone.items()))
            left = len(span) - len(gone)
            told = (
                f"only {left} of its {len(span)} samples are left"
                if left
                else f"none of its {len(span)} samples is left"
            )
            trial.reason = f"{told}. Sample {first}: {why}. {advice(why)}".rstrip()
            log.error("%s: %s", trial.title, trial.reason)
        trial.lost = {}

    def _measure(self, trial: Trial) -> int | None:
        """Fill in a trial's values and errors; how many samples its race wants of it now, if any."""
        needed = trial.recipe, self.study.metrics, trial.first_index, trial.stop, self.store, self.study.group_by
        trial.values, trial.errors = measure(*needed)
        if trial.proposal.race is None:
            return None
        may_win = not _above_its_cap(trial)
        return trial.proposal.race.look(trial, self.study.metrics, self.store, self.study.group_by, may_win)

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
        self._lose(trial)
        more = None
        needed = (trial.recipe, scorers(self.study.metrics), trial.first_index, trial.stop, self.store)
        trial.cost = self.ledger.cost_of(*needed) | self.ledger.speedup(*needed)
        if not trial.reason:
            try:
                more = self._measure(trial)
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
        if not trial.reason and (reason := _above_its_cap(trial)):
            trial.reason = reason
            log.error("%s: %s", trial.title, reason)
        without = aside(trial.recipe, scorers(self.study.metrics), self.store)
        trial.quarantined = {i: why for i, why in without.items() if trial.first_index <= i < trial.stop}
        trial.state = "failed" if trial.reason else "degraded" if trial.quarantined else "complete"
        trial.commit = origin()["commit"]
        if trial.recipe.calibrations:
            kept = [self.store.get_json(ARTIFACTS, c.key) or {} for c in trial.recipe.calibrations]
            trial.cost["calibration_nfe"] = float(sum(meta.get("cost", {}).get("nfe", 0) for meta in kept))
            trial.times = self._times(trial)
        self.search.tell(trial.proposal, None if trial.state == "failed" else trial.told)
        self.tracker.log(trial)
        self.watch.ended(trial)


def _above_its_cap(trial: Trial) -> str:
    """Why a trial that took too long fails; empty when it did not."""
    cap = trial.recipe.parts.strategy.budget.get("seconds")
    if cap is None or (trial.seconds or 0.0) <= cap:
        return ""
    return (
        f"its samples took {trial.seconds:.3g} device-seconds each, above strategy.budget.seconds={cap:g}. "
        "Raise it, or use fewer steps or candidates."
    )
