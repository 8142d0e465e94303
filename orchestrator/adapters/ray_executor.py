"""Ray: long-lived actors that keep the model, in one pool or in one per stage."""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestrator import telemetry
from orchestrator.adapters import ray_rewards
from orchestrator.adapters.ray_metrics import RayMetrics
from orchestrator.ports import ExecutorLost, Load, WorkerLost
from orchestrator.registries import executors

log = logging.getLogger("solvus")

_FIELDS = {"workers", "cpus", "gpus", "resources"}
TASKS_PER_WORKER = 2  # one on the accelerator, one being written


@executors.register("ray")
@dataclass(frozen=True)
class RayExecutor:
    """Fan tasks out over Ray actors; results come back in completion order.

    An actor lives as long as the study, so the model is loaded once a worker; a plain Ray task on a GPU would get a new
    process every call. While one task uses the accelerator, the one before is encoded and written. A worker that dies,
    or does not answer any more, is replaced and its tasks given to others; an exception in a task is the task's result
    and is never retried. Workers come and go with the cluster's nodes.

    Args:
        workers: number of actors that generate; 0 means as many as the cluster has room for, now and later.
        address: "local" starts Ray on this machine; "auto" or host:port joins a cluster.
        cpus: CPUs per actor.
        gpus: accelerators per actor; fractions share one.
        pools: further pools by stage, ``{score: {workers: 1, gpus: 0.5}, write: {workers: 4}}``, with ``workers``,
            ``cpus``, ``gpus`` and ``resources`` each; with ``decode``, latents become images while the network works on
            the next shard; a stage without a pool runs where the rows were generated.
        reward_actor: ``{num_cpus: 1, num_gpus: 0, env: {pip: [...]}, metrics: false}`` has the rewards that strategies
            ask scored in an actor of their own, one for each reward, while the worker goes on with the next batch (so
            it holds two in memory); empty scores them where the rows are generated. ``metrics: true`` has it score
            the rewards that metrics read too. Values are the same bit for bit on one kind of device.
        max_losses: how often a task's worker may die before the task itself is suspected.
        silence_s: how long a worker may not answer before it counts as lost. Ray alone can wait for ever for a node
            whose link was cut.
        metrics_port: where the agent of a Ray that is started here serves numbers to Prometheus; 0 takes a free port.
            On a cluster Ray has its own (``ray start --metrics-export-port``).

    Reference: Moritz et al. 2018, "Ray: A Distributed Framework for Emerging AI Applications".
    """

    workers: int = 2
    address: str = "local"
    cpus: float = 1.0
    gpus: float = 0.0
    pools: dict[str, Any] = field(default_factory=dict)
    reward_actor: dict[str, Any] = field(default_factory=dict)
    max_losses: int = 3
    silence_s: float = 60.0
    metrics_port: int = 0

    def __post_init__(self) -> None:
        ray_rewards.check(self.reward_actor)
        if self.workers < 0:
            raise ValueError(
                f"executor.workers must be at least 0 (0: as many as there is room for), got {self.workers}."
            )
        if not 0 <= self.metrics_port < 65536:
            raise ValueError(f"executor.metrics_port must lie in 0..65535 (0: any free one), got {self.metrics_port}.")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"executor.cpus and executor.gpus must not be negative, got {self.cpus} and {self.gpus}.")
        if self.max_losses < 1 or self.silence_s <= 0:
            raise ValueError("executor.max_losses must be at least 1 and executor.silence_s positive.")
        for stage, pool in self.pools.items():
            if stage not in ("decode", "write", "score"):
                raise ValueError(
                    f"executor.pools.{stage}: stages with a pool of their own are decode, write and score."
                )
            if not isinstance(pool, Mapping) or not set(pool) <= _FIELDS or pool.get("workers", 1) < 1:
                raise ValueError(
                    f"executor.pools.{stage} takes {', '.join(sorted(_FIELDS))}, workers >= 1; got {pool!r}."
                )

    def start(self, study: str = "") -> RayPool:
        """Start or join Ray and make the actors; ``study`` labels what they say of themselves."""
        return RayPool(self, study)


@dataclass
class _Job:
    """A task on its way through the stages."""

    function: Callable[..., Any]
    task: Any
    future: Future
    stage: str = "generate"
    carried: Any = None  # reference to what the stage before made
    losses: int = 0


class _Worker:
    """One actor: its handle, its tasks in flight, and whether it owes an answer."""

    def __init__(self, stage: str, handle: Any) -> None:
        self.stage, self.handle = stage, handle
        self.jobs: list[_Job] = []
        self.ready = False  # it has answered once
        self.lost = False
        self.asked: float | None = None  # when the pulse was asked for that it owes


class RayPool:
    """The actors of one launch, and the one thread that owns them.

    Ray's callbacks run on a thread of its own that must not be held up (a call back into Ray from there never returns),
    so they only leave a note. The pool's thread reads the notes, hands out tasks and listens for the workers' pulse.
    """

    def __init__(self, spec: RayExecutor, study: str = "") -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray, self._spec, self._study = ray, spec, study
        self._owned = not ray.is_initialized()
        if self._owned:
            local = spec.address == "local"
            room = max(spec.workers, 1) * spec.cpus
            room += self._spec.reward_actor.get("num_cpus", 1) if self._spec.reward_actor else 0
            room += sum(pool.get("workers", 1) * pool.get("cpus", 1.0) for pool in spec.pools.values())
            options: dict[str, Any] = {"num_cpus": max(math.ceil(room), 1), "include_dashboard": False} if local else {}
            if local and spec.metrics_port:
                options["_metrics_export_port"] = spec.metrics_port
            ray.init(
                address=spec.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                **options,
            )
        self._workers: list[_Worker] = []
        self._waiting: deque[_Job] = deque()
        self._open: set[Future] = set()
        self._broken: ExecutorLost | None = None
        self._notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed, self._load, self._retried = False, Load(), 0
        self._metrics = telemetry.open_sink(RayMetrics(study))
        self._ready_since = time.monotonic()
        self._target = max(spec.workers, 1)
        for _ in range(self._target):
            self._add("generate")
        for stage, pool in spec.pools.items():
            for _ in range(pool.get("workers", 1)):
                self._add(stage)
        self._thread = threading.Thread(target=self._own, name="ray-pool", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> int:
        """How many tasks may be in flight: a few per worker."""
        return TASKS_PER_WORKER * max(self._target, 1) * (1 + len(self._spec.pools))

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        """Run a function on a worker; one with stages runs each where its pool is."""
        job = _Job(function, task, Future())
        job.future.set_running_or_notify_cancel()
        self._open.add(job.future)
        job.future.add_done_callback(self._open.discard)
        if self._broken is not None:
            _end(job.future, self._broken)
        self._notes.put(lambda: self._waiting.append(job))
        return job.future

    def load(self) -> Load:
        """As the pool's thread saw it last."""
        return self._load

    def close(self) -> None:
        """End the actors, and Ray if this launch started it."""
        self._closed = True
        telemetry.close_sink(self._metrics)
        self._thread.join(10)
        for worker in self._workers:
            self._kill(worker)
        if self._owned:
            self._ray.shutdown()

    # --- the pool's own thread ---------------------------------------------------------------------------------------

    def _own(self) -> None:
        try:
            self._work()
        except Exception as error:  # without this thread, whoever waits for a task would wait for ever
            self._broken = ExecutorLost(f"the pool of Ray workers broke ({type(error).__name__}: {error})")
            self._broken.__cause__ = error
            for future in list(self._open):
                _end(future, self._broken)

    def _work(self) -> None:
        interval = max(min(self._spec.silence_s / 6, 5.0), 0.2)
        listened = time.monotonic()
        while not self._closed:
            try:
                self._notes.get(timeout=min(interval, 0.5))()
                while True:
                    self._notes.get_nowait()()
            except queue.Empty:
                pass
            self._dispatch()
            self._load = self._look()
            if time.monotonic() - listened > interval:
                listened = time.monotonic()
                self._listen()

    def _look(self) -> Load:
        jobs = [*self._waiting, *(job for worker in self._workers for job in worker.jobs)]
        stages = {stage: sum(job.stage == stage for job in jobs) for stage in ("generate", *self._spec.pools)}
        return Load(stages, sum(worker.stage == "generate" for worker in self._workers), self._retried)

    def _add(self, stage: str) -> None:
        pool = self._spec.pools.get(stage, {"cpus": self._spec.cpus, "gpus": self._spec.gpus})
        groups = {"work": TASKS_PER_WORKER, "pulse": 1}
        decorate: Any = self._ray.remote
        remote = decorate(concurrency_groups=groups)(_Actor).options(
            num_cpus=pool.get("cpus", 1.0),
            num_gpus=pool.get("gpus", 0.0),
            resources=dict(pool.get("resources", {})) or None,
            max_restarts=0,
        )
        worker = _Worker(stage, remote.remote(dict(self._spec.reward_actor), self._study))
        self._workers.append(worker)
        self._ask(worker)

    def _note(self, reference: Any, handle: Callable[[Future], None]) -> None:
        """When a reference is there, have the pool's thread handle it."""
        reference.future().add_done_callback(lambda done: self._notes.put(partial(handle, done)))

    def _ask(self, worker: _Worker) -> None:
        worker.asked = time.monotonic()
        reference = worker.handle.pulse.options(concurrency_group="pulse").remote()
        self._note(reference, partial(self._answered, worker))

    def _answered(self, worker: _Worker, done: Future) -> None:
        if done.exception() is not None:
            self._lose(worker, done.exception())
        else:
            worker.ready, worker.asked = True, None

    def _lose(self, worker: _Worker, error: BaseException | None) -> None:
        """Replace a worker and give its tasks to others."""
        if worker.lost or self._closed:
            return
        worker.lost = True
        self._workers.remove(worker)
        log.warning("a worker was lost with %d task(s) in flight; they run again", len(worker.jobs))
        self._kill(worker)
        for job in worker.jobs:
            self._again(job, error)
        self._add(worker.stage)

    def _kill(self, worker: _Worker) -> None:
        try:
            self._ray.kill(worker.handle)
        except Exception as gone:  # it may be beyond reach, which is why it was lost
            log.debug("killing a worker: %s", gone)

    def _again(self, job: _Job, error: BaseException | None) -> None:
        """Run a job from its beginning, unless it was lost too often."""
        job.losses += 1
        job.stage, job.carried = "generate", None
        if job.losses < self._spec.max_losses:
            self._retried += 1
            self._waiting.appendleft(job)
        else:
            why = type(error).__name__ if error else "silence"
            job.future.set_exception(WorkerLost(f"its worker died {job.losses} times ({why})"))

    def _listen(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.asked is None:
                self._ask(worker)
            elif worker.ready and now - worker.asked > self._spec.silence_s:
                self._lose(worker, None)
        if self._spec.workers == 0:
            self._follow_the_cluster()
        if any(worker.ready for worker in self._workers):
            self._ready_since = now
        elif now - self._ready_since > 60:
            self._ready_since = now
            spec = self._spec
            log.warning(
                "no worker could start for a minute: the cluster has no room for %g CPU and %g GPU",
                spec.cpus,
                spec.gpus,
            )

    def _follow_the_cluster(self) -> None:
        have, spec = self._ray.cluster_resources(), self._spec
        room = have.get("GPU", 0.0) / spec.gpus if spec.gpus else have.get("CPU", 0.0) / max(spec.cpus, 0.01)
        self._target = max(int(room), 1)
        present = sum(worker.stage == "generate" for worker in self._workers)
        for _ in range(self._target - present):
            self._add("generate")

    def _dispatch(self) -> None:
        for job in list(self._waiting):
            free = [w for w in self._workers if w.ready and w.stage == job.stage and len(w.jobs) < TASKS_PER_WORKER]
            if not free:
                continue
            worker = min(free, key=lambda w: len(w.jobs))
            self._waiting.remove(job)
            worker.jobs.append(job)
            calls, following = self._calls(job)
            reference = worker.handle.work.options(concurrency_group="work").remote(calls, job.task, job.carried)
            self._note(reference, partial(self._finished, worker, job, reference, following))

    def _calls(self, job: _Job) -> tuple[list[Callable[..., Any]], str | None]:
        """The functions that the job's present worker runs, and the stage that comes after them."""
        from orchestrator.worker import STAGES, perform

        if job.function is not perform or not self._spec.pools:
            return [job.function], None
        names = list(STAGES)
        calls: list[Callable[..., Any]] = [STAGES[job.stage]]
        for name in names[names.index(job.stage) + 1 :]:
            if name in self._spec.pools:
                return calls, name
            calls.append(STAGES[name])
        return calls, None

    def _finished(self, worker: _Worker, job: _Job, reference: Any, following: str | None, done: Future) -> None:
        error = done.exception()
        lost = self._ray.exceptions
        if isinstance(error, lost.RayActorError | lost.WorkerCrashedError):
            self._lose(worker, error)
            return
        if job not in worker.jobs:
            return  # the worker was given up meanwhile, and the task with it
        worker.jobs.remove(job)
        if isinstance(error, lost.ObjectLostError):
            self._again(job, error)
        elif error is not None:
            cause = getattr(error, "cause", None)
            job.future.set_exception(cause if isinstance(cause, Exception) else error)
        elif following is not None:
            job.stage, job.carried = following, reference
            self._waiting.appendleft(job)
        else:
            job.future.set_result(done.result())


def _end(future: Future, error: Exception) -> None:
    with suppress(InvalidStateError):  # both threads may come to it
        future.set_exception(error)


class _Actor:
    """Runs tasks in a warm process; answers its pulse from another thread."""

    def __init__(self, reward_actor: dict[str, Any], study: str) -> None:
        from orchestrator import worker

        telemetry.open_sink(RayMetrics(study))

        if reward_actor:
            worker.SERVED.append(partial(ray_rewards.ServedReward, options=reward_actor))
            if reward_actor.get("metrics"):
                worker.SERVED_METRICS.append(worker.SERVED[-1])

    def work(self, calls: list[Callable[..., Any]], task: Any, carried: Any) -> Any:
        """Some functions in a row: the first takes the task (and what was carried), the others what came before."""
        result = carried
        for i, call in enumerate(calls):
            result = call(task) if i == 0 and carried is None else call(task, result)
        return result

    def pulse(self) -> bool:
        """Alive."""
        return True
