"""What a run tells Prometheus, and the dashboard that shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator import telemetry
from orchestrator.adapters.prometheus_endpoint import Endpoint
from orchestrator.executors.local import LocalExecutor
from orchestrator.telemetry import METERS

Solvus = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "dashboards" / "grafana"
ASKED = ["rows", "nfe", "queue", "reward_seconds", "device_busy_ratio", "retries", "quarantined", "best", "spent"]
PROMETHEUS = shutil.which("prometheus")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


class ListSink:
    """The in-memory twin of a sink."""

    def __init__(self) -> None:
        self.said: list[tuple[str, float, Mapping[str, str]]] = []

    def record(self, name: str, meter: Any, value: float, labels: Mapping[str, str]) -> None:
        self.said.append((name, value, labels))

    def close(self) -> None:
        """Nothing."""


@pytest.fixture
def sink() -> Iterator[ListSink]:
    """A sink that is open for one test."""
    found = ListSink()
    telemetry.open_sink(found)
    yield found
    telemetry.close_sink(found)


def test_what_workers_count_adds_up_to_what_the_ledger_has(
    make_study: Any, launch: Any, sink: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = launch(make_study())

    def total(name: str, **labels: str) -> float:
        return sum(value for said, value, given in sink.said if said == name and labels.items() <= given.items())

    spent = done.ledger.spent
    assert (total("solvus_rows"), total("solvus_nfe")) == (32, spent["nfe"])
    assert total("solvus_device_seconds", stage="generate") == pytest.approx(spent["generate_s"])
    assert total("solvus_device_seconds", stage="score") == pytest.approx(spent["score_s"])
    assert total("solvus_reward_seconds", scorer="ink") == pytest.approx(spent["score_s"])
    assert total("solvus_scored") == spent["scored"] == 32
    for stage in ("generate", "write", "score"):
        assert sum(name == "solvus_stage_seconds" and given == {"stage": stage} for name, _, given in sink.said) == 2


def test_a_run_says_every_number_of_the_catalogue_that_has_something_to_count(
    solvus: Solvus, tmp_path: Path, sink: ListSink
) -> None:
    argv = ["study=tiny", "search.space={nfe:[3]}", "num_samples=32", "batch_size=32", "tracker=none"]
    assert solvus("run", *argv, f"root={tmp_path}").code == 0
    assert {name for name, _, _ in sink.said} == set(METERS)


def test_a_sink_that_breaks_costs_a_log_line_and_never_the_run(
    make_study: Any, launch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ListSink):
        def record(self, *_: Any) -> None:
            raise OSError("gone")

    broken = telemetry.open_sink(Broken())
    try:
        assert [trial.state for trial in launch(make_study()).trials] == ["complete"]
        assert caplog.text.count("not sent to Broken any more: gone") == 1
    finally:
        telemetry.close_sink(broken)


def test_an_endpoint_serves_counters_gauges_and_histograms_and_gives_its_port_back() -> None:
    endpoint = Endpoint(0, "mine")
    telemetry.open_sink(endpoint)
    try:
        telemetry.record("solvus_rows", 3)
        telemetry.record("solvus_rows", 0)
        telemetry.record("solvus_rows", 4)
        telemetry.record("solvus_best", -1.5, part="a/b", value="quality/x")
        telemetry.record("solvus_stage_seconds", 0.02, stage="write")
        text = get(endpoint.port, "/metrics")
    finally:
        telemetry.close_sink(endpoint)
    assert 'solvus_rows_total{study="mine"} 7.0' in text
    assert 'solvus_best{part="a/b",study="mine",value="quality/x"} -1.5' in text
    assert 'solvus_stage_seconds_bucket{le="0.03",stage="write",study="mine"} 1.0' in text
    Endpoint(endpoint.port, "again").close()


def test_a_port_that_is_taken_or_impossible_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="metrics_port .* cannot be opened.*Choose another"):
            LocalExecutor(metrics_port=taken.getsockname()[1]).start("x")
    with pytest.raises(ValueError, match="metrics_port must lie in 0..65535"):
        LocalExecutor(metrics_port=-1)
    assert not telemetry.is_heard()


# --- the dashboard ---------------------------------------------------------------------------------------------------


def queries() -> list[tuple[str, str]]:
    """(panel, query) of every dashboard."""
    found = []
    for path in GRAFANA.glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    return found


def named(query: str) -> set[str]:
    """The series that a query asks for, without Ray's prefix."""
    return set(re.findall(r"\(ray_\)\?(solvus_\w+)", query))


def test_every_query_names_series_that_a_run_exports_and_the_dashboard_leaves_none_out() -> None:
    exposed = {series: name for name, meter in METERS.items() for series in meter.exposed(name)}
    used = set()
    for panel, query in queries():
        assert named(query) and named(query) <= set(exposed), panel
        assert query.count("solvus_") == query.count('study=~"$study"'), panel
        used |= {exposed[series] for series in named(query)}
    assert used == set(METERS)
    assert {f"solvus_{name}" for name in ASKED} <= used


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    for path in GRAFANA.glob("*.json"):
        cells: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
            assert not own & cells and max(x for x, _ in own) < 24 and panel["description"], panel["title"]
            cells |= own


def test_provisioning_files_are_yaml_and_point_at_each_other() -> None:
    import yaml

    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/solvus.yaml").read_text())["providers"]
    jobs = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())["scrape_configs"]
    assert source["type"] == "prometheus" and provider["options"]["path"] == "${SOLVUS_DASHBOARDS}"
    assert {job["job_name"] for job in jobs} == {"solvus", "ray"}


class Scraper:
    """A Prometheus of our own that scrapes one port of this machine every half second."""

    def __init__(self, folder: Path, target: int) -> None:
        folder.mkdir()
        jobs = [{"job_name": "x", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}]
        config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self.port = free_port()
        assert PROMETHEUS is not None
        self._process = subprocess.Popen(
            [PROMETHEUS, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address=127.0.0.1:{self.port}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip

    def ask(self, query: str) -> list[Any]:
        """The points of a query over the last five minutes; empty while Prometheus starts."""
        now = time.time()
        form = urllib.parse.urlencode({"query": query, "start": now - 300, "end": now, "step": 1})
        try:
            answer = json.loads(get(self.port, f"/api/v1/query_range?{form}"))
        except OSError:
            return []
        assert answer["status"] == "success", answer
        return [point for series in answer["data"]["result"] for point in series["values"] if point[1] != "NaN"]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(
    PROMETHEUS is None, reason="there is no prometheus on this machine (Debian: apt install prometheus)"
)
@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.timeout(500)
def test_every_query_of_every_panel_returns_data_of_a_real_run(tmp_path: Path, executor: str) -> None:
    target = free_port()
    # Many small shards, so that counters are seen to rise; a reward, for there is a panel of them.
    argv = ["study=tiny", "search.space={nfe:[16],seed:[0,1,2,3,4,5,6,7]}", "num_samples=8192", "batch_size=16",
            "shard_size=64", "metrics=[{name: mean_reward, reward: ink}]", "tracker=none", "price_per_device_hour=1",
            f"root={tmp_path / 'root'}", f"executor.metrics_port={target}"]  # fmt: skip
    argv = [f"executor={executor}", *argv, *(["executor.workers=1"] if executor == "ray" else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_metrics_report_interval_ms": "500"}
    environment["PYTHONPATH"] = str(ROOT)
    scraper = Scraper(tmp_path / "prometheus", target)
    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-m", "orchestrator.cli", "run", *argv]
    run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        left = [
            (panel, query.replace("$study", "tiny").replace("$__rate_interval", "10s")) for panel, query in queries()
        ]
        deadline = time.monotonic() + 400
        while left and time.monotonic() < deadline:
            running = run.poll() is None
            left = [(panel, query) for panel, query in left if not scraper.ask(query)]
            if not running:
                break
            time.sleep(1)
        assert left == [], (tmp_path / "log").read_text()[-2000:]
    finally:
        run.terminate()
        run.wait(60)
        scraper.close()
        log.close()
