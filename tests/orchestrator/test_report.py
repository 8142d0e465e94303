"""The report: one file that opens without a network, says what is there, and never lets text become markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dashboards.report import build, samples
from dashboards.report import search as search_report
from dashboards.report.study import open_view
from dashboards.report.view import Row
from orchestrator.results import Results
from orchestrator.store import Store

Solvus = Callable[..., Any]
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png>"


class Page(HTMLParser):
    """What a browser would load and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.loads, self.tags, self.inside = "", [], [], ""  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        given = {name: value or "" for name, value in attrs}
        for attribute in ("src", "href", "srcset", "poster", "data", "action"):
            if attribute in given and tag != "a":
                self.loads.append(given[attribute])
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import", data)
        elif self.inside != "script":
            self.text += data + " "


def rendered(root: Path, name: str = "tiny") -> Page:
    return Page(Path(build.write(str(root), name)).read_text())


def edit(root: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = root / "studies" / "tiny" / "trials.parquet"
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


def configure(root: Path, **changes: Any) -> None:
    path = root / "studies" / "tiny" / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished root that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_finished_study_is_one_file_that_loads_nothing_from_a_network(root: Path) -> None:
    page = rendered(root)
    assert [path.name for path in (root / "studies" / "tiny").glob("*.html")] == ["report.html"]
    assert [target for target in page.loads if not target.startswith(("data:", "#"))] == []
    assert "script" in page.tags  # the figures' library is inside


def test_the_page_says_question_state_values_costs_and_commit(root: Path) -> None:
    text = rendered(root).text
    (first, *_) = Results(str(root), "tiny").trials()
    assert "Which solver is closest" in text and "complete" in text
    assert f"{first['value/quality/frechet']:.4g}" in text
    assert first["commit"] in text
    assert "network evaluations" in text and "Quality against cost" in text


def test_the_page_names_the_winner_at_every_cost(root: Path) -> None:
    text = rendered(root).text
    table = Results(str(root), "tiny").trials()
    for nfe in (3, 5):
        best = min((row for row in table if row["nfe"] == nfe), key=lambda row: row["value/quality/frechet"])
        solver = {"ddim": "DDIM", "heun": "Heun"}[json.loads(best["recipe"])["solver"]["name"]]
        assert f"At {nfe} evaluations: {solver} with the uniform grid, {best['value/quality/frechet']:.3f} ±" in text


def test_a_study_without_results_has_a_page_that_says_so(root: Path) -> None:
    (root / "studies" / "tiny" / "trials.parquet").unlink()
    page = rendered(root)
    assert "no trials yet" in page.text and "solvus run study=tiny" in page.text
    assert "script" not in page.tags


def test_a_study_of_no_trials_has_a_page(root: Path, solvus: Solvus) -> None:
    edit(root, lambda table: [])
    assert "no trials yet" in rendered(root).text


def test_half_a_study_shows_what_is_there_and_what_failed(root: Path) -> None:
    def half(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in table[2:]:
            row |= {name: None for name in row if name.startswith(("value/", "se/"))}
            row |= {"state": "failed", "reason": f"shard abc failed: {EVIL}"}
        table[3] |= {"state": "running", "reason": ""}
        return table

    edit(root, half)
    page = rendered(root)
    assert "Failed trials" in page.text and f"shard abc failed: {EVIL}" in page.text
    assert "running" in page.text
    assert "Trials" in page.text and "What won" in page.text
    assert page.loads == []


def test_a_study_of_failures_only_has_a_page(root: Path) -> None:
    def broken(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        keep = [{k: v for k, v in row.items() if not k.startswith(("value/", "se/"))} for row in table]
        return [row | {"state": "failed", "reason": "it broke"} for row in keep]

    edit(root, broken)
    page = rendered(root)
    assert "it broke" in page.text and "What won" not in page.text


def test_text_from_people_never_becomes_markup(root: Path) -> None:
    configure(root, question=EVIL, name=EVIL)

    def evil(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"part": EVIL, "title": EVIL, "commit": EVIL} for row in table]

    before = rendered(root)
    edit(root, evil)
    page = rendered(root)
    assert page.text.count("alert('x')") >= 4
    assert page.tags.count("img") == before.tags.count("img")
    assert [target for target in page.loads if "evil" in target] == []
    raw = (root / "studies" / "tiny" / "report.html").read_text()
    assert "<script>alert" not in raw and "<img src=http" not in raw


def test_rows_that_are_gone_cost_pictures_and_pairing_not_the_page(root: Path) -> None:
    shutil.rmtree(root / "store" / "rows")
    shutil.rmtree(root / "store" / "columns")
    page = rendered(root)
    assert "At 3 evaluations" in page.text and "Trials" in page.text


def test_damaged_rows_cost_pairing_not_the_page(root: Path) -> None:
    for path in (root / "store" / "columns").rglob("*.parquet"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert "At 3 evaluations" in rendered(root).text


def test_mixed_commits_are_pointed_out(root: Path) -> None:
    assert "mixes commits" not in rendered(root).text
    edit(root, lambda table: [row | {"commit": f"commit-{i % 2}"} for i, row in enumerate(table)])
    text = rendered(root).text
    assert "mixes commits" in text and "commit-0, commit-1" in text


def test_image_studies_show_the_same_samples_of_every_trial(solvus: Solvus, tmp_path: Path) -> None:
    argv = ["model=digits", "name=pictures", "metrics=[frechet]", "num_samples=80", "batch_size=80", "nfe=1"]
    done = solvus("run", *argv, "search=grid", "search.space={solver:[ddim,euler]}", "tracker=none", f"root={tmp_path}")
    assert done.code == 0, done.out
    page = rendered(tmp_path, "pictures")
    pictures = [target for target in page.loads if target.startswith("data:image/png;base64,")]
    assert len(pictures) == page.tags.count("img") == 2
    assert pictures[0] == pictures[1]  # DDIM without noise is Euler
    sheet = Image.open(io.BytesIO(base64.b64decode(pictures[0].split(",")[1]))).convert("L")
    assert sheet.size == (8 * samples.GRID_COLUMNS, 8)
    (first, *_) = Results(str(tmp_path), "pictures").trials()
    (table,) = Store(tmp_path).read("rows", first["key"], 0, 20)
    for i, item in enumerate(table["image"].to_pylist()):
        kept = Image.open(io.BytesIO(item["bytes"]))
        assert sheet.crop((8 * i, 0, 8 * i + 8, 8)).tobytes() == kept.tobytes()
    assert "labels 0 1 2 3 4 5 6 7 8 9 0 1" in page.text


def test_a_unified_solver_is_shown_by_its_preset_and_what_changed() -> None:
    def label(**fields: Any) -> str:
        solver = {"name": "unified", "preset": "unipc", "steps": None, "hooks": []} | fields
        return Row({"recipe": json.dumps({"solver": solver})}).solver

    assert label() == "unipc"
    assert label(max_order=2, hooks=[{"name": "dual_fast"}]) == "unipc (2, dual_fast)"
    assert label(steps=[{}]) == "own schedule"


def test_a_search_is_answered_on_held_out_samples_with_its_optimism_at_equal_counts(
    solvus: Solvus, tmp_path: Path
) -> None:
    """The same trial run on as many fresh samples by hand has the value that the report compares with."""
    plain = ["run", "model=gmm", "metrics=[{name:frechet,features:identity}]", "num_samples=64", "batch_size=32"]
    plain += ["tracker=none", "solver=ddim", f"root={tmp_path}", "--json"]
    search = ["search=random", "search.num_trials=4", "search.space={nfe:{low:3,high:9}}", "search.held_out=256"]
    searched = solvus(*plain, "name=found", *search, "search.baselines=[{nfe:2}]")
    assert searched.code == 0, searched.err
    results = Results(str(tmp_path), "found")
    best = results.best()
    again = solvus(*plain, "name=again", f"first_index={2**30}", f"nfe={best['nfe']}")
    (row,) = Results(str(tmp_path), "again").trials()
    text = " ".join(rendered(tmp_path, "found").text.split())
    chosen, fresh = best["value/quality/frechet"], row["value/quality/frechet"]
    assert again.code == 0
    assert f"The winner is trial {best['number']}: {chosen:.3f}" in text
    assert f"The optimism of the choice is {fresh - chosen:+.3g}: {fresh:.3f} on the first 64 samples" in text
    assert "Against the best baseline (baseline 1; held out" in text and "(paired)" in text
    ((table,), name) = search_report.answers(open_view(str(tmp_path), "found"))[1], f"trial {best['number']}"
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert (cells["winner"], cells["samples"], cells["held-out samples"]) == (name, 64, 256)
    assert cells["optimism"].value == pytest.approx(fresh - chosen) and cells["best baseline"] == "baseline 1"


def test_a_failed_trial_is_never_the_best(solvus: Solvus, tmp_path: Path) -> None:
    """Its value may be: it took longer than was allowed, say."""
    argv = ["run", "model=gmm", "metrics=[{name:frechet,features:identity}]", "num_samples=32", "search=random"]
    argv += ["search.num_trials=3", "search.held_out=0", "search.space={nfe:{low:3,high:9}}", "tracker=none"]
    assert solvus(*argv, "name=found", f"root={tmp_path}").code == 0
    results = Results(str(tmp_path), "found")
    first = results.best()
    file = tmp_path / "studies" / "found" / "trials.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        row["state"] = "failed" if row["number"] == first["number"] else row["state"]
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert results.best()["number"] != first["number"]


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_the_scaling_study_and_space_plan_and_keep_their_budget(solvus: Callable, tmp_path: Path) -> None:
    found = solvus("plan", "study=scaling", f"root={tmp_path}", "--json")
    assert found.code == 0, found.err
    assert found.data["nfe"] == 12 * 512 * 64
    searched = ["model=digits", "solver=ddim", "solver.eta=1", "reward=class_log_prob", "metrics=[mean_reward]"]
    found = solvus("plan", *searched, "search=tpe", "space=scaling", f"root={tmp_path}", "--json")
    assert found.code == 0, found.err
    assert found.data["nfe"] <= 256 * found.data["samples_to_make"]


def test_a_report_of_strategies_says_at_which_cost_and_draws_what_candidates_buy(
    solvus: Callable, tmp_path: Path
) -> None:
    arms = [
        "{nfe:2,strategy:{name:best_of_n,n:8}}", "{nfe:4,strategy:{name:best_of_n,n:4}}", "{nfe:16,strategy:single}",
        "{nfe:4,strategy:{name:fk_steering,particles:4,first:1,every:1,strength:50}}",
    ]  # fmt: skip
    run = solvus(
        "run", "model=digits", "solver=ddim", "solver.eta=1", "reward=symmetry",
        "metrics=[{name: mean_reward, reward: symmetry}]",
        "search=grid", f"search.space={{allocation:[{','.join(arms)}]}}", "num_samples=16", "batch_size=64",
        "tracker=none", "name=arms", f"root={tmp_path}",
    )  # fmt: skip
    assert run.code == 0, run.err
    page = (tmp_path / "studies" / "arms" / "report.html").read_text()
    assert "At 16 evaluations a sample (to 5%)" in page
    assert "Costs differ:" in page and "against 0 reward calls" in page
    assert "pass@k" in page and "Best split of 16 evaluations: best of" in page
    assert "best of k follows" in page and "standard errors)" in page
    assert "pass@k by BIC" in page and "saturating beta" in page and "p0" in page
    assert "best_of_n n=4, DDIM (eta=1), 4 steps [best]:" in page and "single, DDIM (eta=1), 16 steps [sample]:" in page
    assert "Recommended at this cost:" in page and "random halves of the" in page and "Holm" in page
    assert "seconds of scoring inside strategies" in page


def test_a_bias_that_stays_is_named() -> None:
    def gives(**spec: Any) -> str:
        return Row({"recipe": json.dumps({"strategy": spec})}).gives

    assert gives(name="single") == gives(name="fk_steering") == gives(name="das") == "sample"
    assert gives(name="best_of_n") == gives(name="beam") == gives(name="rollover") == gives(name="svdd") == "best"
    assert gives(name="svdd", selection="softmax") == "sample, biased: the reward of the mean is not the soft value"
    assert gives(name="svdd", selection="softmax", value="monte_carlo") == "sample"
    assert gives(name="dps").startswith("sample, biased") and gives(name="fk_steering", output="best") == "best"
