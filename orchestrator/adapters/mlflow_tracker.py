"""MLflow: a mirror of the trial table that can be rebuilt from the store at any time."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.adapters import mlflow_pages as pages
from orchestrator.files import is_remote, join, open_files
from orchestrator.redact import redact, redact_all
from orchestrator.registries import trackers
from orchestrator.store import Store

log = logging.getLogger("solvus")

MAX_PARAM = 500
MAX_BATCH = 100  # parameters of one call
MAX_METRICS = 1000  # metrics of one call
ENDS = {"interrupted": "KILLED", "failed": "FAILED"}  # what MLflow calls the end of a launch
DESCRIBE_S = 60.0  # how often the description is written while a study runs
# Measurements have no clock of their own; one fixed time makes sending them twice the same as sending them once.
EPOCH_MS = 1_700_000_000_000


@trackers.register("mlflow")
@dataclass(frozen=True)
class MLflow:
    """Log every trial as an MLflow run: experiment = study, parent run = launch, child run = trial.

    Runs in a thread of its own, so a slow or absent server never holds up generation. What could not be sent is sent
    when the server is back, in this launch or the next, once: a run that is there already is found by its tags.

    The experiment and the launch carry a description with the main table and a link to charts of quality against
    cost. A metric's step is the number of samples that it rests on, so a race shows as a curve.

    Args:
        uri: tracking URI; null takes $MLFLOW_TRACKING_URI, or else ``mlflow.db`` and ``mlartifacts/`` under the root.
        grace_s: how long the end of a study waits for a server that is away.
        pictures: samples of every trial to show as one image, at equal index; 0 sends none.
        system_metrics: log the driver's processor, memory, disk, network and accelerators to the launch every ten
            seconds, in a thread of its own. Only launches that send a trial have one.

    Reference: Zaharia et al. 2018, "Accelerating the Machine Learning Lifecycle with MLflow".
    """

    uri: str | None = None
    grace_s: float = 30.0
    pictures: int = 16
    system_metrics: bool = True

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise ValueError(f"tracker.pictures must be at least 0 (0: none), got {self.pictures}.")

    def start(self, study: Any) -> Mirror:
        """Begin to mirror a launch of a study.

        Raises:
            ValueError: the root is a URL and there is no tracking server.
        """
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and is_remote(study.root):
            raise ValueError(
                f"root {study.root} is no folder, so MLflow needs a server. Set tracker.uri or tracker=none."
            )
        return Mirror(uri or local_uri(study.root), study, self.grace_s, self.pictures, self.system_metrics)


def local_uri(root: str) -> str:
    """The tracking URI of a root that has no server."""
    return f"sqlite:///{Path(root).absolute() / 'mlflow.db'}"


class Memo:
    """What a database of this machine was already sent, so that a finished study need not even open it.

    A server is always asked instead, and a database that is gone is filled anew.
    """

    FILE = "tracked.json"

    def __init__(self, uri: str, study: Any) -> None:
        self._files: Any = None
        self._sent: dict[str, str] = {}
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not is_remote(study.root):
            self._files = open_files(join(study.root, "studies", study.name))
            if path.exists():
                try:
                    self._sent = {str(k): str(v) for k, v in json.loads(self._files.read(self.FILE)).items()}
                except (FileNotFoundError, ValueError, AttributeError):
                    pass

    def has(self, trial: Any) -> bool:
        """Whether this very result was sent."""
        return self._sent.get(trial.identity) == trial.fingerprint()

    def add(self, trial: Any) -> None:
        """Note that it was."""
        self._sent[trial.identity] = trial.fingerprint()

    def save(self) -> None:
        """Keep the notes."""
        if self._files is not None:
            self._files.write(self.FILE, json.dumps(self._sent).encode())


def _is_ours(error: Exception) -> bool:
    """Whether it is a fault of our own code, which an answer that cannot be read (of a proxy, say) is not."""
    faults = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
    return isinstance(error, faults) and not isinstance(error, OSError | json.JSONDecodeError)


class Mirror:
    """The thread that talks to MLflow."""

    def __init__(self, uri: str, study: Any, grace_s: float, pictures: int, system_metrics: bool) -> None:
        self._uri, self._study, self._grace = uri, study, grace_s
        self._pictures, self._system = pictures, system_metrics
        self._monitor: Any = None
        self._trials: list[Any] = []  # all that ended, sent now or before: the description's table
        self._described = -math.inf
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._client: Any = None
        self._parent: str | None = None
        self._known: dict[str, str] = {}  # trial identity -> fingerprint of what was sent
        self._unfinished: dict[str, str] = {}  # trial identity -> run that was begun but not finished
        self._away = False
        self._give_up_at = math.inf
        self._memo = Memo(uri, study)
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, trial: Any) -> None:
        """Send a finished trial some time soon."""
        self._trials.append(trial)
        self._queue.put(("trial", trial))

    def close(self, state: str, summary: Mapping[str, Any], artifacts: list[tuple[str, bytes]]) -> None:
        """Send what is left, then the artifacts; give up on a server that stays away, soon when interrupted."""
        if state == "interrupted":
            self._grace = min(self._grace, 5.0)
        self._queue.put(("close", (state, summary, artifacts)))
        last, moved = self._queue.qsize(), time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if self._queue.qsize() != last:
                last, moved = self._queue.qsize(), time.monotonic()
            if time.monotonic() - moved > (self._grace if self._away or self._client is None else 2 * self._grace + 60):
                self._give_up_at = 0.0
                log.warning("MLflow stays away; the store has everything, and the next run sends what is missing")
                return

    def _work(self) -> None:
        while True:
            kind, item = self._queue.get()
            wait = 0.5
            while True:
                try:
                    self._handle(kind, item)
                    self._away = False
                    break
                except Exception as error:  # tracking is a mirror: whatever happens to it, generation goes on
                    if _is_ours(error):  # trying again would not help, and hold up what waits behind it
                        what = f"trial {item.number}" if kind == "trial" else "the summary"
                        log.warning(
                            "%s did not reach MLflow (%s: %s): a fault of Solvus, not of the server, please report it. "
                            "The store has everything", what, type(error).__name__, redact(str(error)),
                        )  # fmt: skip
                        break
                    if not self._away:
                        lines = redact(str(error)).splitlines()
                        log.warning(
                            "MLflow is away (%s: %s); trying again", type(error).__name__, lines[0] if lines else ""
                        )
                    self._away, self._client = True, None
                    if time.monotonic() > self._give_up_at:
                        return
                    time.sleep(wait)
                    wait = min(2 * wait, 15.0)
            if kind == "close":
                return

    def _connect(self) -> None:
        # Its own retries would take minutes a call; ours go on for as long as the study does.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        import mlflow

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._mlflow = mlflow
        client = mlflow.MlflowClient(tracking_uri=self._uri)
        experiment = client.get_experiment_by_name(self._study.name)
        if experiment is None:
            # A server knows where artifacts go; a bare database would put them into the current folder.
            served = self._uri.startswith(("http://", "https://", "databricks")) or is_remote(self._study.root)
            place = None if served else (Path(self._study.root).absolute() / "mlartifacts").as_uri()
            self._experiment = client.create_experiment(self._study.name, artifact_location=place)
        else:
            self._experiment = experiment.experiment_id
        self._known, self._unfinished, token = {}, {}, None
        while True:
            page = client.search_runs([self._experiment], max_results=1000, page_token=token)
            for run in page:
                identity = run.data.tags.get("solvus.trial")
                if identity is None:
                    continue
                if run.info.status == "RUNNING":
                    self._unfinished[identity] = run.info.run_id
                elif "solvus.values" in run.data.tags:
                    self._known.setdefault(identity, run.data.tags["solvus.values"])  # the newest comes first
            token = page.token
            if not token:
                break
        self._client = client

    def _handle(self, kind: str, item: Any) -> None:
        if kind == "trial" and self._memo.has(item):
            return
        if self._client is None and (kind == "trial" or self._parent is not None):
            self._connect()
        if kind == "trial":
            self._send(item)
            self._memo.add(item)
            if self._parent is not None and time.monotonic() - self._described > DESCRIBE_S:
                self._describe()
        elif self._parent is not None:
            state, summary, artifacts = item
            for name, data in artifacts:
                self._client.log_text(self._parent, data.decode(), name)
            self._client.log_batch(self._parent, metrics=self._metrics(summary, 0))
            self._describe()
            if self._monitor is not None:
                self._monitor.finish()
            self._client.set_terminated(self._parent, status=ENDS.get(state, "FINISHED"))
            self._memo.save()

    def _metrics(self, values: Mapping[str, Any], step: int) -> list[Any]:
        return [
            self._mlflow.entities.Metric(name, float(value), EPOCH_MS, step)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]

    def _describe(self) -> None:
        """Say on the pages of the experiment and the launch what came out so far, and keep charts for it."""
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

        trials, goal = list(self._trials), self._study.goal
        text = pages.description(self._study.question, trials, goal, self._experiment)
        self._client.set_tag(self._parent, MLFLOW_RUN_NOTE, text)
        self._client.set_experiment_tag(self._experiment, MLFLOW_RUN_NOTE, text)
        if goal is not None:
            shown = self._study.recipe.parts.model.kind == "image" and self._pictures > 0
            view = pages.chart_view(goal, self._study.num_samples if shown else None)
            self._client.set_experiment_tag(self._experiment, pages.VIEW_TAG, view)
            self._client.set_experiment_tag(self._experiment, "mlflow.experiment.primaryMetric.name", goal[0])
            better = str(goal[1] == "higher")
            self._client.set_experiment_tag(self._experiment, "mlflow.experiment.primaryMetric.greaterIsBetter", better)
            points = pages.improvements(trials, goal)
            history = [self._mlflow.entities.Metric(key, value, EPOCH_MS, step) for key, value, step in points]
            for start in range(0, len(history), MAX_METRICS):
                self._client.log_batch(self._parent, metrics=history[start : start + MAX_METRICS])
        self._described = time.monotonic()

    def _launch(self) -> str:
        if self._parent is None:
            from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

            tags = {"solvus.study": self._study.name, MLFLOW_RUN_NOTE: self._study.question}
            run = self._client.create_run(self._experiment, tags=tags, run_name=f"{self._study.name} launch")
            self._parent = run.info.run_id
            self._client.log_text(self._parent, json.dumps(redact_all(self._study.config), indent=1), "study.json")
            if self._system:
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                self._monitor = SystemMetricsMonitor(self._parent, tracking_uri=self._uri)
                self._monitor.start()
        return self._parent

    def _send(self, trial: Any) -> None:
        fingerprint = trial.fingerprint()
        if self._known.get(trial.identity) == fingerprint:
            return
        tags = {
            "mlflow.parentRunId": self._launch(),
            "solvus.study": self._study.name,
            "solvus.part": trial.part,
            "solvus.trial": trial.identity,
            "solvus.recipe": trial.recipe.key,
            "solvus.solver": trial.recipe.solver["name"],
            "solvus.nfe": str(trial.recipe.nfe),
            "solvus.state": trial.state,
            "solvus.reason": trial.reason[:5000],
            "solvus.commit": trial.commit,
            "mlflow.source.git.commit": trial.commit,
        }
        begun = self._unfinished.pop(trial.identity, None)
        if begun is None:
            begun = self._client.create_run(self._experiment, tags=tags, run_name=trial.title).info.run_id
        described = trial.described()
        params = {
            path: text if len(text := _text(value)) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"
            for path, value in _flat({"sampler": pages.sampler(described), "part": trial.part} | described)
        }
        entities = self._mlflow.entities
        errors = {f"{name}_se": error for name, error in trial.errors.items()}
        costs = {} if trial.seconds is None else {"cost/seconds": trial.seconds}  # device-seconds of one sample
        costs |= {"cost/speedup": trial.cost["speedup"]} if "speedup" in trial.cost else {}
        metrics = self._metrics(trial.values | errors | costs, trial.num_samples)
        for look in trial.looks:
            if look.samples < trial.num_samples:
                metrics += self._metrics({trial.proposal.race.objective: look.value}, look.samples)
        entries = [entities.Param(path, text) for path, text in params.items()]
        for start in range(0, len(entries), MAX_BATCH):
            self._client.log_batch(begun, params=entries[start : start + MAX_BATCH])
        self._client.log_batch(
            begun,
            metrics=metrics,
            tags=[entities.RunTag("solvus.values", fingerprint)],
        )
        self._client.log_inputs(begun, self._inputs(trial))
        strip = None
        if trial.state != "failed":
            strip = pages.picture(trial, Store(self._study.root, create=False), self._pictures)
        if strip is not None:
            self._client.log_image(begun, strip, key="samples", step=trial.num_samples, timestamp=EPOCH_MS)
        self._client.set_terminated(begun, status="FAILED" if trial.state == "failed" else "FINISHED")
        self._known[trial.identity] = fingerprint

    def _inputs(self, trial: Any) -> list[Any]:
        entities = self._mlflow.entities
        return [
            entities.DatasetInput(
                entities.Dataset(name, digest, "solvus", source), [entities.InputTag("mlflow.data.context", context)]
            )
            for context, name, digest, source in pages.datasets(trial)
        ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
