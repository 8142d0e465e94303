"""MLflow's pages answer which sampler is how good at which cost: what is logged, and how a browser shows it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from orchestrator import cli
from orchestrator.adapters import mlflow_pages as pages
from orchestrator.adapters.mlflow_tracker import MLflow
from orchestrator.results import Results

# MLflow's own tables, under the SQLAlchemy that is installed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy is deprecated:sqlalchemy.exc.SADeprecationWarning"
)

GOAL = ("quality/frechet", "lower")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def a_trial(number: int, nfe: int, value: float | None, **more: Any) -> Any:
    described = {"solver": {"name": "ddim"}, "times": {"name": "uniform"}}
    fields = {"number": number, "nfe": nfe, "part": "grid", "state": "complete", "stopped": False, "num_samples": 64,
              "values": {} if value is None else {GOAL[0]: value}, "errors": {GOAL[0]: 0.1}, "seconds": 0.002,
              "proposal": SimpleNamespace(baseline=""), "described": lambda: described}  # fmt: skip
    return SimpleNamespace(**fields | more)


def test_the_table_has_the_best_first_at_every_cost_and_says_what_is_missing() -> None:
    trials = [a_trial(0, 8, 2.0), a_trial(1, 4, 5.0), a_trial(2, 4, 3.0), a_trial(3, 4, None, state="failed"),
              a_trial(4, 4, 1.0, stopped=True)]  # fmt: skip
    text = pages.description("Which one?", trials, GOAL, "7")
    table = [line for line in text.splitlines() if line.startswith("| ") and "grid" in line]
    assert [line.split("|")[1].strip() for line in table] == ["4", "4", "8"]
    assert ["**3 ± 0.2**" in table[0], "5 ± 0.2" in table[1], "**2 ± 0.2**" in table[2]] == [True] * 3
    assert text.startswith("Which one?\n") and "1 of 5 trials failed" in text and "lower is better" in text
    assert "#/experiments/7/runs?compareRunsMode=CHART&viewStateShareKey=solvus" in text


def test_a_long_table_keeps_the_best_of_every_cost_and_fits_a_tag() -> None:
    trials = [a_trial(i, 2 + i % 5, 10.0 - i / 100) for i in range(500)]
    text = pages.description("?", trials, GOAL, "7")
    assert f"The best {pages.MOST_ROWS} of 500" in text and len(text) < 8000
    for cost in range(5):
        best = max(i for i in range(500) if i % 5 == cost)
        assert f"| #{best} grid |" in text


def test_text_of_people_cannot_leave_its_cell() -> None:
    evil = a_trial(0, 4, 1.0, part="a|b\n<script>[x](http://e)")
    (row,) = [line for line in pages.description("?", [evil], GOAL, "7").splitlines() if line.startswith("| 4")]
    assert row.count("|") - row.count("\\|") == 7 and "<script>" not in row.replace("\\<", "")


def test_without_a_value_the_description_says_so() -> None:
    assert "No trial has a value yet" in pages.description("", [], GOAL, "7")
    assert "No trial has a value yet" in pages.description("", [a_trial(0, 4, 1.0)], None, "7")


def test_the_search_history_is_the_best_value_after_so_many_trials() -> None:
    trials = [a_trial(i, 4, value) for i, value in enumerate([3.0, 4.0, 2.0, 2.5])] + [a_trial(4, 4, 9.0, part="b#c")]
    assert pages.improvements(trials, GOAL) == [
        ("best/grid/quality/frechet", 3.0, 1),
        ("best/grid/quality/frechet", 2.0, 3),
        ("best/b_c/quality/frechet", 9.0, 1),
    ]


def test_a_negative_number_of_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="tracker.pictures must be at least 0"):
        MLflow(pictures=-1)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a small study of images, tracked in MLflow."""
    root = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
        argv = ["run", "study=tiny", "model=digits_flow", "metrics=[{name: kid, features: identity}]",
                f"root={root}", "question=Which sampler is best?", "search.space={solver:[ddim,dpmpp_2m],nfe:[2,3]}",
                "num_samples=16", "batch_size=16", "shard_size=16", "tracker.pictures=6",
                "tracker.grace_s=200"]  # fmt: skip
        assert cli.main(argv) == 0
    return root


@pytest.fixture(scope="module")
def logged(tracked: Path) -> SimpleNamespace:
    """Its client, experiment, launch and trials."""
    client = MlflowClient(tracking_uri=f"sqlite:///{tracked / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    (launch,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in found if "mlflow.parentRunId" in run.data.tags]
    return SimpleNamespace(client=client, experiment=experiment, launch=launch, trials=trials)


def test_experiment_and_launch_carry_the_same_description_and_the_charts(logged: SimpleNamespace) -> None:
    tags = logged.experiment.tags
    assert tags["mlflow.note.content"] == logged.launch.data.tags["mlflow.note.content"]
    assert tags["mlflow.experiment.primaryMetric.name"] == "quality/kid"
    assert tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == "False"
    view = json.loads(tags[pages.VIEW_TAG])
    assert [chart["type"] for chart in view["compareRunCharts"]] == ["SCATTER", "PARALLEL", "BAR", "IMAGE"]
    metrics, params = logged.trials[0].data.metrics, logged.trials[0].data.params
    for chart in view["compareRunCharts"]:
        keys = [chart[axis]["key"] for axis in ("xaxis", "yaxis") if axis in chart]
        assert {*keys, *chart.get("selectedMetrics", [])} <= set(metrics)
        assert set(chart.get("selectedParams", [])) <= set(params)


def test_a_trial_says_its_sampler_its_cost_its_data_and_shows_its_samples(logged: SimpleNamespace) -> None:
    assert {run.data.params["sampler"] for run in logged.trials} == {"ddim uniform", "dpmpp_2m uniform"}
    for run in logged.trials:
        assert run.data.metrics["cost/seconds"] > 0 and run.data.params["part"] == "solvers"
        data = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
        assert data["samples"].name == "samples 0-16 of seed 0" and data["model"].name == "digits_flow"
        images = [item.path for item in logged.client.list_artifacts(run.info.run_id, "images")]
        assert any(path.endswith(".png") and "samples" in path for path in images)
    assert len({item.dataset.digest for run in logged.trials for item in run.inputs.dataset_inputs}) == 2


def test_the_launch_has_the_search_history_and_the_machines_own_metrics(logged: SimpleNamespace) -> None:
    keys = set(logged.launch.data.metrics)
    assert "best/solvers/quality/kid" in keys
    assert any(key.startswith("system/") for key in keys)


def test_a_picture_shows_the_first_samples_side_by_side(tracked: Path) -> None:
    from orchestrator import rows
    from orchestrator.store import Store
    from tasks.recipe import Recipe

    store = Store(tracked, create=False)
    key = Results(str(tracked), "tiny").trials()[0]["key"]
    recipe = Recipe(**store.get_json("recipes", key))
    trial = SimpleNamespace(recipe=recipe, num_samples=16, first_index=0, stop=16)
    strip = pages.picture(trial, store, 6)
    assert strip is not None and strip.dtype == np.uint8 and strip.shape == (66, 6 * 66)
    images = np.concatenate([rows.samples(t, (1, 8, 8)) for t in store.read("rows", key, 0, 6)])
    assert np.array_equal(strip[1:65:8, 67:131:8], np.rint((images[1, 0].clip(-1, 1) + 1) * 127.5).astype(np.uint8))
    assert pages.picture(trial, store, 0) is None
    assert pages.picture(SimpleNamespace(**vars(trial) | {"first_index": 10**6, "stop": 10**6 + 16}), store, 6) is None


def test_a_picture_has_the_levels_of_the_stored_one() -> None:
    from orchestrator import rows

    between = ((np.arange(255) + 0.5) / 127.5 - 1.0).astype(np.float32)  # in float32 some round otherwise
    x0 = np.append(between, 1.0).astype(np.float32).reshape(1, 1, 16, 16)
    made = {name: np.zeros(1) for name in ("sample_id", "label", "nfe")}
    table = rows.to_table(made | {"x0": x0}, "image", {})
    model = SimpleNamespace(kind="image", shape=(1, 16, 16))
    recipe = SimpleNamespace(key="", parts=SimpleNamespace(model=model))
    store: Any = SimpleNamespace(read=lambda *_: [table])
    strip = pages.picture(SimpleNamespace(recipe=recipe, num_samples=1, first_index=0, stop=1), store, 1)
    stored = rows.decode_png(table["image"][0].as_py()["bytes"])[0]
    assert strip is not None and np.array_equal(strip[1:65:4, 1:65:4], np.rint((stored + 1.0) * 127.5))


def test_a_picture_of_tokens_is_what_they_decode_to(tmp_path: Path) -> None:
    from orchestrator import run
    from orchestrator.store import Store
    from tasks.recipe import Recipe

    found = run("model=digits_tokens", "solver=ancestral", "name=t", "nfe=2", "num_samples=4", "batch_size=4",
                "metrics=[]", "tracker=none", f"root={tmp_path}")  # fmt: skip
    store = Store(tmp_path, create=False)
    recipe = Recipe(**store.get_json("recipes", found.trials().to_pylist()[0]["key"]))
    strip = pages.picture(SimpleNamespace(recipe=recipe, num_samples=4, first_index=0, stop=4), store, 3)
    assert strip is not None and strip.shape == (66, 3 * 66) and strip.max() > 0


# --- the pages -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tracked: Path) -> Iterator[str]:
    """The address of a real MLflow server over that root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tracked / 'mlflow.db'}",
         "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env=environment, cwd=tracked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A page of a headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install solvus[dev]"
    )
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1600})
        page.set_default_timeout(90_000)
        yield page
        browser.close()


def shoot(page: Any, name: str) -> None:
    """Keep a screenshot: in $SOLVUS_ARTIFACTS, or else in build/screenshots."""
    folder = Path(os.environ.get("SOLVUS_ARTIFACTS", "build/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"mlflow-{name}.png")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_launch_page_shows_question_and_table(page: Any, server: str, logged: SimpleNamespace) -> None:
    run = logged.launch.info
    page.goto(f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}")
    page.get_by_text("Which sampler is best?").first.wait_for()
    cells = page.locator("table").filter(has_text="device-s a sample").locator("tbody tr")
    cells.first.wait_for()
    assert cells.count() == 4
    shoot(page, "launch")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_chart_page_opens_with_quality_against_cost_without_set_up(
    page: Any, server: str, logged: SimpleNamespace
) -> None:
    experiment = logged.experiment.experiment_id
    page.goto(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={pages.VIEW}")
    ours = page.get_by_text("Which sampler at which cost").first
    ours.wait_for()
    page.locator(".js-plotly-plot .scatterlayer .point").first.wait_for(state="attached")
    page.locator(".parcoords").first.wait_for(state="attached")
    page.locator("img[src*='samples']").first.wait_for()
    generated = page.get_by_text("cost", exact=True).first
    generated.wait_for()
    at = [place.bounding_box() for place in (ours, generated)]
    assert at[0]["y"] < at[1]["y"]  # what the study asked stands above what MLflow draws of every metric
    shoot(page, "charts")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_compare_page_draws_parallel_coordinates_of_the_trials(
    page: Any, server: str, logged: SimpleNamespace
) -> None:
    runs = urllib.parse.quote(json.dumps([run.info.run_id for run in logged.trials]))
    experiments = urllib.parse.quote(json.dumps([logged.experiment.experiment_id]))
    page.goto(f"{server}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.locator(".js-plotly-plot .parcoords").first.wait_for(state="attached")
    page.get_by_text("dpmpp_2m uniform").first.wait_for()
    shoot(page, "compare")
