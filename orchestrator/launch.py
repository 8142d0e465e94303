"""One launch of a study, from checking what it will take to its report."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from orchestrator.exits import Terminated
from orchestrator.files import is_remote
from orchestrator.foreseen import foreseen
from orchestrator.ledger import Ledger
from orchestrator.loop import run as run_study
from orchestrator.progress import Progress
from orchestrator.recent import Recent
from orchestrator.redact import redact
from orchestrator.registries import executors, trackers
from orchestrator.results import Results
from orchestrator.store import Store


def launch(study: Any, command: str, report: Callable[[str, str], str]) -> tuple[dict[str, Any], list[str]]:
    """Run a study to its end, and write its tables, its state and its report.

    However it ends, its workers are let go, the trials so far are in its table, and the tracker knows.

    Args:
        study: what ``config.study`` returns.
        command: what to type to launch it again, for the report.
        report: writes the report of a root and a name, and returns where it lies.

    Returns:
        what came of it, as plain data and in lines for people.
    """
    store = Store(study.root)
    results = Results(study.root, study.name)
    ahead = foreseen(study, store)
    if ahead["samples_to_make"] or ahead["companions"]:
        from tasks.run import load_model

        load_model(study.recipe)
    results.save_study(study)
    ledger = Ledger(study.price_per_device_hour)
    began = time.monotonic()
    results.save_state("running", {"foreseen": ahead})
    with ExitStack() as ends:
        ends.enter_context(_terminable())
        tracker = trackers.build(study.config["tracker"]).start(study)
        told: dict[str, Any] = {"state": "interrupted", "summary": {}, "artifacts": []}
        ends.callback(lambda: tracker.close(**told))
        trials, watch = _searched(study, store, results, tracker, ledger, ahead)
        failed = [trial for trial in trials if trial.state == "failed"]
        degraded = [trial for trial in trials if trial.state == "degraded"]
        summary = {
            "study": study.name,
            "state": "failed" if failed else "degraded" if degraded else "complete",
            "trials": len(trials),
            "failed": len(failed),
            "degraded": len(degraded),
            "samples_made": watch.samples,
            "samples_reused": watch.reused,
            "wall_s": round(time.monotonic() - began, 2),
            **{name: round(value, 3) for name, value in ledger.summary().items()},
        }
        results.save_state(str(summary["state"]), summary | {"command": redact(command)})
        told |= {"state": summary["state"], "summary": {f"study/{name}": value for name, value in summary.items()}}
        path = report(study.root, study.name)
        told["artifacts"] = [("report.html", results.files.read("report.html"))]
    summary["report"] = path
    lines = [
        f"{study.name}: {summary['state']}, {len(trials)} trials ({len(failed)} failed), "
        f"{watch.samples:,} samples made and {watch.reused:,} reused in {summary['wall_s']:.1f} s "
        f"({ledger.spent['nfe']:,.0f} network evaluations, {ledger.spent['reward_calls']:,.0f} reward calls).",
        *(f"  failed {trial.title}: {trial.reason}" for trial in failed),
        *(f"  degraded {trial.title}: rows {list(trial.quarantined)} are quarantined" for trial in degraded),
        f"report: {path}",
    ]
    return summary, lines


def _searched(
    study: Any, store: Store, results: Results, tracker: Any, ledger: Ledger, ahead: dict[str, Any]
) -> tuple[list[Any], Progress]:
    """The trials of a study's search, and who watched it."""
    trials: list[Any] = []
    recent = Recent()
    try:
        with ExitStack() as ends:
            executor = executors.build(study.config["executor"]).start(study.name)
            ends.callback(executor.close)
            logging.getLogger("solvus").addHandler(recent)
            ends.callback(logging.getLogger("solvus").removeHandler, recent)
            watch = Progress(
                ahead,
                report=lambda numbers: results.save_state("running", numbers),
                report_s=10.0 if is_remote(study.root) else 2.0,
                load=executor.load,
                spent=ledger.summary,
                goal=study.goal,
                recent=recent,
            )
            ends.callback(watch.close)
            searched = run_study(study, executor, store, tracker, watch, ledger, trials)
    except BaseException:  # Ctrl-C and SIGTERM too: what was done must be told however a launch ends
        results.save_trials(trials)
        results.save_state("interrupted", {"trials": sum(trial.state != "running" for trial in trials)})
        raise
    results.save_trials(trials)
    results.save_search(searched)
    return trials, watch


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what runs inside as Ctrl-C does; whoever called has their own handler back afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(signum: int, frame: Any) -> None:
    raise Terminated
