"""The ports that face outward: where work runs, where it is told, and who proposes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

# Overrides of a proposal that say which samples it takes, and nothing about how they are made.
EXTENT = ("num_samples", "first_index")


class WorkerLost(Exception):
    """A task whose worker died again and again: the task may be what kills it."""


class ExecutorLost(Exception):
    """The executor itself is gone, and every task with it: the launch ends, and the same command continues it."""


@dataclass(frozen=True)
class Load:
    """What an executor is doing.

    Attributes:
        stages: tasks by the stage that they wait for or are in.
        devices: workers that generate.
        retried: how often a task was given to another worker because its own was lost.
    """

    stages: Mapping[str, int] = field(default_factory=dict)
    devices: int = 1
    retried: int = 0


class Executor(Protocol):
    """Runs pure functions somewhere. ``slots`` bounds how many may be in flight."""

    slots: int

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future: ...
    def load(self) -> Load: ...
    def close(self) -> None: ...


class Tracker(Protocol):
    """Is told of finished trials. A tracker that is away costs a log line, never a result."""

    def log(self, trial: Any) -> None: ...
    def close(self, state: str, summary: Mapping[str, Any], artifacts: list[tuple[str, bytes]]) -> None: ...


@dataclass(frozen=True)
class Proposal:
    """A trial that a search proposes.

    Attributes:
        overrides: dotted paths to values, over the study's recipe; ``num_samples`` and ``first_index`` too.
        part: the part of the study that it belongs to.
        handle: whatever the search needs to recognise it in ``tell``.
        race: the race that it runs in (``orchestrator/racing.py``); None gives it all its samples at once.
        settled: whether an earlier launch decided it already; it is not grown again.
        baseline: what people call it, if it is a known schedule that the search must beat.
    """

    overrides: Mapping[str, Any]
    part: str = ""
    handle: Any = None
    race: Any = None
    settled: bool = False
    baseline: str = ""


class Search(Protocol):
    """Proposes trials and learns from them; one with ``lists = True`` proposes what its preview says.

    ``ask`` returns None when there is nothing to propose just now; the study is over when it does so with nothing in
    flight. ``tell`` gets None for a failed trial; of a raced one it gets the estimate on all samples, and as
    ``study/num_samples`` on how many it rests. ``preview`` lists, without side effects, trials like those to come.
    ``summary``, which a search may leave out, says what came of it, one mapping for each search inside.
    """

    def ask(self) -> Proposal | None: ...
    def tell(self, proposal: Proposal, values: Mapping[str, float] | None) -> None: ...
    def preview(self) -> Iterator[Proposal]: ...
    def summary(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class SearchContext:
    """What a search may know of its study.

    Attributes:
        study: the study's name.
        key: content key of what the search ranges over, so that another space is another search.
        seed: the study's seed.
        root: where the study's files lie.
        storage: URL of Optuna's storage; None keeps ``optuna.db`` under the root.
        better: which way is up, per value name.
        recipe: what overrides are laid over.
        num_samples, first_index: the samples of a trial that overrides neither.
        metrics: specs of the study's metrics.
    """

    study: str
    key: str
    seed: int
    root: str
    storage: str | None = None
    better: Mapping[str, str] = field(default_factory=dict)
    recipe: Any = None
    num_samples: int = 1
    first_index: int = 0
    metrics: Sequence[dict[str, Any]] = ()
