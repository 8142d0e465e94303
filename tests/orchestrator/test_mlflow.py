"""MLflow is a mirror: every trial once, as a run that people can find and compare; losing it costs a warning."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator import cli
from orchestrator.results import Results

# MLflow's own tables, under the SQLAlchemy that is installed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)

Solvus = Callable[..., Any]
STUDY = ["study=tiny", "search.space={solver:[ddim,heun],nfe:[3,5]}", "num_samples=64", "batch_size=32"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose small study ``tiny`` was tracked in MLflow."""
    root = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert cli.main(["run", *STUDY, f"root={root}", "question=Which one?"]) == 0
    return root


@pytest.fixture(autouse=True)
def _no_server_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def runs(root: Path, name: str = "tiny") -> tuple[list[Any], list[Any]]:
    """Launches and trials of a study, oldest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    launches = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return launches, [run for run in found if "mlflow.parentRunId" in run.data.tags]


def test_every_trial_is_a_finished_child_run_of_its_launch(tracked: Path) -> None:
    launches, trials = runs(tracked)
    (launch,) = launches
    assert len(trials) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {launch.info.run_id}
    assert {run.info.status for run in [launch, *trials]} == {"FINISHED"}
    assert launch.data.tags["mlflow.note.content"].startswith("Which one?\n")


def test_a_run_carries_the_params_metrics_and_tags_of_its_trial(tracked: Path) -> None:
    table = Results(str(tracked), "tiny").trials()
    trials = {run.data.tags["solvus.recipe"]: run for run in runs(tracked)[1]}
    assert trials.keys() == {row["key"] for row in table}
    for row in table:
        run, recipe = trials[row["key"]], json.loads(row["recipe"])
        assert run.data.metrics["quality/frechet"] == row["value/quality/frechet"]
        assert run.data.metrics["quality/frechet_se"] == row["se/quality/frechet"]
        assert run.data.metrics["cost/nfe"] == row["nfe"]
        assert run.data.params["solver.name"] == recipe["solver"]["name"]
        assert run.data.params["times.num_steps"] == str(recipe["times"]["num_steps"])
        assert (run.data.params["nfe"], run.data.params["num_samples"]) == (str(row["nfe"]), "64")
        tags = run.data.tags
        assert (tags["solvus.study"], tags["solvus.part"], tags["solvus.state"]) == ("tiny", "solvers", "complete")
        assert (tags["solvus.solver"], tags["solvus.nfe"]) == (recipe["solver"]["name"], str(row["nfe"]))
        assert tags["solvus.commit"] == row["commit"]
        assert row["title"] == run.info.run_name


def test_metrics_are_stamped_with_the_number_of_samples_they_rest_on(tracked: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked / 'mlflow.db'}")
    for run in runs(tracked)[1]:
        (point,) = client.get_metric_history(run.info.run_id, "quality/frechet")
        assert point.step == 64


def test_the_launch_keeps_the_study_its_totals_and_the_report(tracked: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked / 'mlflow.db'}")
    ((launch,), _) = runs(tracked)
    assert {item.path for item in client.list_artifacts(launch.info.run_id)} == {"study.json", "report.html"}
    kept = Path(client.download_artifacts(launch.info.run_id, "report.html"))
    assert kept.read_bytes() == (tracked / "studies" / "tiny" / "report.html").read_bytes()
    assert launch.data.metrics["study/trials"] == 4 and launch.data.metrics["study/samples_made"] == 256


def test_logging_again_sends_nothing_new_and_a_new_trial_is_one_more_run(
    solvus: Solvus, tmp_path: Path, tracked: Path
) -> None:
    argv = ["run", "name=again", "num_samples=16", "batch_size=16", f"root={tmp_path}"]
    argv += ["tracker=mlflow", f"tracker.uri=sqlite:///{tracked / 'mlflow.db'}"]
    assert solvus(*argv).code == 0
    first = runs(tracked, "again")
    assert [len(found) for found in first] == [1, 1]
    assert solvus(*argv).code == 0
    assert [[r.info.run_id for r in found] for found in runs(tracked, "again")] == [
        [r.info.run_id for r in found] for found in first
    ]
    assert solvus(*argv, "search=grid", "search.space={seed:[0,1]}").code == 0
    assert len(runs(tracked, "again")[1]) == 2
    # What no tracker heard of is sent by the next launch that has one.
    assert solvus(*argv[:-2], "seed=7", "tracker=none").code == 0
    assert solvus(*argv, "seed=7").code == 0
    assert {run.data.params["seed"] for run in runs(tracked, "again")[1]} == {"0", "1", "7"}


@pytest.mark.parametrize("uri", ["sqlite:///{}/file/mlflow.db", "http://user:hunter2@127.0.0.1:1"])
def test_a_server_that_is_away_costs_a_warning_and_never_a_result(solvus: Solvus, tmp_path: Path, uri: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    done = solvus("run", "num_samples=16", "batch_size=16", f"root={tmp_path}", "tracker=mlflow",
                  f"tracker.uri={uri.format(tmp_path)}", "tracker.grace_s=0.1", "--json")  # fmt: skip
    assert (done.code, done.data["state"], done.data["samples_made"]) == (0, "complete", 16)
    assert re.search("MLflow (is|stays) away", done.err) and "Traceback" not in done.err
    assert "hunter2" not in done.out + done.err


def test_a_trial_that_cannot_be_shown_holds_nothing_up(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: Path
) -> None:
    def broken(trial: Any, *_: Any) -> None:
        if trial.number == 0:
            raise ValueError("no such picture")

    monkeypatch.setattr("orchestrator.adapters.mlflow_pages.picture", broken)
    argv = ["run", "name=odd", "num_samples=16", "batch_size=16", f"root={tmp_path}", "tracker=mlflow", "search=grid"]
    done = solvus(
        *argv, "tracker.grace_s=200", "search.space={seed:[0,1]}", f"tracker.uri=sqlite:///{tracked / 'mlflow.db'}"
    )
    assert done.code == 0
    assert "trial 0 did not reach MLflow (ValueError: no such picture): a fault of Solvus" in done.err
    states = {run.data.params["seed"]: run.info.status for run in runs(tracked, "odd")[1]}
    assert states["1"] == "FINISHED" and states.get("0") != "FINISHED"


@pytest.mark.parametrize("where", ["measuring", "report"])
def test_a_launch_that_is_broken_off_does_not_stay_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from orchestrator import loop
    from orchestrator.api import run

    def broken(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    seen = loop.measure
    done: list[int] = []

    def second(*arguments: Any) -> Any:
        done.append(1)
        return seen(*arguments) if len(done) < 2 else broken()

    handler = signal.getsignal(signal.SIGTERM)
    if where == "measuring":
        monkeypatch.setattr(loop, "measure", second)
    else:
        monkeypatch.setattr("dashboards.report.build.write", broken)
    with pytest.raises(KeyboardInterrupt):
        run(*STUDY, f"root={tmp_path}")
    launches, trials = runs(tmp_path)
    assert [launch.info.status for launch in launches] == ["KILLED" if where == "measuring" else "FINISHED"]
    assert len(trials) == (1 if where == "measuring" else 4)
    state = Results(str(tmp_path), "tiny").state()["state"]
    assert state == ("interrupted" if where == "measuring" else "complete")
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_answer_that_cannot_be_read_is_no_fault_of_ours() -> None:
    from requests.exceptions import JSONDecodeError

    from orchestrator.adapters.mlflow_tracker import _is_ours

    assert _is_ours(ValueError("max() of nothing")) and _is_ours(KeyError("x"))
    unreadable = json.JSONDecodeError("Expecting value", "<html>", 0), JSONDecodeError("Expecting value", "<html>", 0)
    assert not any(map(_is_ours, (*unreadable, OSError("refused"), RuntimeError("locked"))))


def test_a_failed_trial_is_a_failed_run_with_its_reason(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: Path
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr("tasks.run.generate", broken)
    argv = ["run", "name=broken", "num_samples=16", "batch_size=16", f"root={tmp_path}", "tracker=mlflow"]
    done = solvus(*argv, f"tracker.uri=sqlite:///{tracked / 'mlflow.db'}")
    assert done.code == 1
    (run,) = runs(tracked, "broken")[1]
    assert run.info.status == "FAILED" and run.data.tags["solvus.state"] == "failed"
    assert "the device fell off" in run.data.tags["solvus.reason"]
    assert not any(name.startswith("quality/") for name in run.data.metrics)


# --- the pages -------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _call(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        text = answer.read()
    return json.loads(text) if text.startswith(b"{") else text.decode()


def test_ui_serves_a_finished_study_over_mlflows_rest_api_and_ends_with_ctrl_c(tracked: Path) -> None:
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "ui", f"root={tracked}", "--port", str(port),
         "--optuna-port", str(_free_port())],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert _call(port, "/health") == "OK"
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        experiments = _call(port, "/api/2.0/mlflow/experiments/search", {"max_results": 100})["experiments"]
        (experiment,) = [item for item in experiments if item["name"] == "tiny"]
        found = _call(port, "/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
        tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found]
        trials = [run for run, tag in zip(found, tags, strict=True) if "mlflow.parentRunId" in tag]
        (launch,) = [run for run, tag in zip(found, tags, strict=True) if "mlflow.parentRunId" not in tag]
        assert len(trials) == 4
        table = {row["key"]: row for row in Results(str(tracked), "tiny").trials()}
        for run, tag in zip(found, tags, strict=True):
            if run in trials:
                metrics = {item["key"]: item["value"] for item in run["data"]["metrics"]}
                params = {item["key"]: item["value"] for item in run["data"]["params"]}
                row = table[tag["solvus.recipe"]]
                assert metrics["quality/frechet"] == pytest.approx(row["value/quality/frechet"], rel=1e-9)
                assert params["nfe"] == str(row["nfe"])
        run_id = launch["info"]["run_id"]
        listed = _call(port, f"/api/2.0/mlflow/artifacts/list?run_id={run_id}")
        assert {item["path"] for item in listed["files"]} == {"study.json", "report.html"}
        page = _call(port, f"/get-artifact?path=report.html&run_uuid={run_id}")
        assert "Which one?" in page
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 0
        with pytest.raises(urllib.error.URLError):
            _call(port, "/health")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(10)


def test_ui_over_a_root_without_a_study_is_refused(solvus: Solvus, tmp_path: Path) -> None:
    done = solvus("ui", f"root={tmp_path}")
    assert done.code == 2 and "Run a study first" in done.err
