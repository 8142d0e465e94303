"""Figures for a paper and studies side by side, through the command line."""

from __future__ import annotations

import csv
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dashboards.report import compare as comparing
from dashboards.report import paper
from dashboards.report.chart import Chart, Series
from dashboards.report.study import open_view
from dashboards.report.table import Measured, Table
from orchestrator import rows
from orchestrator.store import Store
from tasks.intervals import Z95

Solvus = Callable[..., Any]


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished root, with its study a second time under another name."""
    shutil.copytree(finished, tmp_path / "copy")
    shutil.copytree(finished / "studies" / "tiny", tmp_path / "copy" / "studies" / "twin")
    return tmp_path / "copy"


def test_figure_writes_every_figure_and_table_in_all_formats(solvus: Solvus, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper"
    done = solvus("figure", "tiny", "--out", str(out), f"root={root}", "--json")
    assert done.code == 0, done.err
    files = [Path(name) for name in done.data["files"]]
    assert sorted(files) == sorted(out.iterdir())
    assert {path.suffix for path in files} == {".pdf", ".svg", ".csv", ".tex"}
    by_name = {path.name: path for path in files}
    assert by_name["quality_frechet_pareto.pdf"].read_bytes().startswith(b"%PDF")
    assert ET.parse(by_name["quality_frechet_pareto.svg"]).getroot().tag.endswith("svg")
    trials = list(csv.DictReader(by_name["trials.csv"].read_text().splitlines()))
    stored = pq.read_table(root / "studies" / "tiny" / "trials.parquet").to_pylist()
    assert [float(row["quality/frechet"]) for row in trials] == [row["value/quality/frechet"] for row in stored]


def test_the_same_chart_gives_the_same_bytes_and_odd_names_draw(tmp_path: Path) -> None:
    odd = "_a $x^{ 文 <b> & \\"
    curve = Series(odd, [1, 2, 3], [1.0, float("nan"), 3.0], [0, 0, 2.5], [2, 2, 3.5], dashed=True)
    charts = [
        Chart("c", odd, odd, odd, [curve, Series("_", [1], [2], step=True, symbol="x")], log_x=True, ticks_x=[1, 3]),
        Chart("c", "bars", "share", "", [Series("s", [0.1, 0.2], [odd, "b"])], bars=True),
        Chart("empty", "nothing", "x", "y", [Series("s", [], []), Series("t", [], [])], log_y=True),
    ]
    tables = [Table("t", "T", ["v"], [[Measured(1.0, 0.1)]])]
    first, second = (paper.save(charts, tables, tmp_path / name, ["svg"]) for name in ("1", "2"))
    assert [path.name for path in first] == ["c.svg", "c_2.svg", "empty.svg", "t.csv", "t.tex"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a
    pdf, again = (paper.save(charts[1:2], [], tmp_path / name, ["pdf"])[0].read_bytes() for name in ("1", "2"))
    assert pdf == again


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["figure", "nothing", "--out", "x"], "no study in"),
        (["figure", "--out", "x"], "expected 1 studies, got 0"),
        (["figure", "tiny", "--out", "x", "--format", "gif"], "--format must name some of pdf, svg, png, got 'gif'"),
        (["figure", "tiny", "--out", "/proc/nothing/x"], "cannot be written"),
        (["compare", "tiny"], "expected 2 studies, got 1"),
        (["compare", "tiny", "nothing"], "no study in"),
    ],
)
def test_what_cannot_be_drawn_or_compared_is_refused(solvus: Solvus, root: Path, argv: list[str], said: str) -> None:
    done = solvus(*argv, f"root={root}")
    assert done.code == 2 and said in done.err


def test_a_study_without_a_complete_trial_is_refused(solvus: Solvus, root: Path) -> None:
    (root / "studies" / "twin" / "trials.parquet").unlink()
    for argv in (["figure", "twin", "--out", str(root / "x")], ["compare", "tiny", "twin"]):
        done = solvus(*argv, f"root={root}")
        assert done.code == 2 and "study twin has no complete trial" in done.err


def test_a_study_differs_from_itself_by_nothing_on_all_its_samples(solvus: Solvus, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = solvus("compare", "tiny", f"{root}/studies/twin", f"root={root}", "--out", str(out), "--json")
    assert done.code == 0, done.err
    frechet = done.data["compared"][0]
    assert frechet["value"] == "quality/frechet" and frechet["notes"] == []
    best, same = frechet["tables"]
    assert [row[0] for row in best["rows"]] == ["3", "5"] and len(same["rows"]) == 4
    for row in [*best["rows"], *same["rows"]]:
        assert row[5:8] == ["+0 ± 0", "64", "1"]
    assert {path.suffix for path in out.iterdir()} == {".pdf", ".svg", ".csv", ".tex"}


def test_a_paired_difference_is_that_of_the_rows(solvus: Solvus, tmp_path: Path) -> None:
    plain = ["run", "model=gmm", "metrics=[{name:mean_reward,reward:ink}]", "solver=ddim", "batch_size=32", "nfe=4"]
    plain += ["tracker=none", f"root={tmp_path}"]
    assert solvus(*plain, "name=a", "num_samples=64").code == 0
    assert solvus(*plain, "name=b", "num_samples=96", "first_index=32", "solver.eta=1").code == 0
    a, b = (open_view(str(tmp_path), name) for name in "ab")
    (section,) = comparing.compare(a, b)
    (table, *_) = section.tables
    store, ink = Store(tmp_path), {"name": "ink"}

    def column(view: Any) -> np.ndarray:
        recipe = view.recipe(view.complete[0])
        found = store.read("columns", recipe.column_key(ink), 32, 64, ["value"])
        return rows.to_numpy(pa.concat_tables(found)["value"]).astype(np.float64)

    apart = column(a) - column(b)
    (row,) = table.rows
    gap, shared = row[5], row[6]
    assert shared == 32
    assert gap.value == pytest.approx(apart.mean(), abs=1e-9)
    assert gap.half == pytest.approx(Z95 * apart.std(ddof=1) / np.sqrt(32), rel=1e-9)


def test_other_models_and_other_settings_are_pointed_out(root: Path) -> None:
    path = root / "studies" / "twin" / "study.json"
    config = json.loads(path.read_text())
    config["metrics"][1]["max_samples"] = 32
    path.write_text(json.dumps(config | {"model": config["model"] | {"name": "digits"}}))
    kid = next(s for s in comparing.compare(*(open_view(str(root), n) for n in ("tiny", "twin"))) if "kid" in s.title)
    assert any("different settings" in line for line in kid.lines)
    assert any("different models" in line for line in kid.lines)


def test_studies_without_a_common_value_are_refused(root: Path) -> None:
    path = root / "studies" / "twin" / "trials.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([n for n in table.column_names if "/quality/" in n]), path)
    with pytest.raises(ValueError, match="have no quality or reward in common"):
        comparing.compare(*(open_view(str(root), n) for n in ("tiny", "twin")))
