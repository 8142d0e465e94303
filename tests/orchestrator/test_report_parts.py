"""What the report is made of: tables, charts, drawings, sprites, tests and fronts, each against an exact answer."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dashboards.report import build, cost, samples, search, svg, won
from dashboards.report.chart import Chart, Series
from dashboards.report.study import open_view
from dashboards.report.table import Measured, Table
from dashboards.report.view import Row
from orchestrator.store import Store

ODD = 'a & b_c 100% $x^2$ {"<script>"} \\ ~'


def test_csv_has_every_digit_and_reads_back() -> None:
    table = Table("t", "T", ["name", "value", "n"], [[ODD, Measured(1 / 3, 0.01), 2], ["line\nbreak", None, 12345]])
    head, first, second = csv.reader(io.StringIO(table.csv()))
    assert head == ["name", "value", "value half-width", "n"]
    assert first == [ODD, str(1 / 3), "0.01", "2"]
    assert second == ["line\nbreak", "", "", "12345"]


def test_latex_escapes_everything_that_means_something_to_it() -> None:
    text = Table("t", "T", ["na_me", "v"], [[ODD, Measured(0.5, 0.01)]]).latex()
    assert r"na\_me & v \\" in text and r"0.5 $\pm$ 0.01 \\" in text
    assert r"a \& b\_c 100\% \$x\textasciicircum{}2\$ \{" in text and r"\textbackslash{} \textasciitilde{}" in text
    assert text.startswith(r"\begin{tabular}{lr}")


def test_a_number_that_is_none_is_said_so_and_never_zero() -> None:
    table = Table("t", "T", ["v"], [[math.nan], [None], [Measured(None)]])
    assert table.shown() == [["not a number"], [""], [""]]


def test_holms_correction_on_a_worked_example() -> None:
    assert won.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert won.holm([0.6, 0.9]) == [1.0, 1.0] and won.holm([]) == []


def test_a_difference_of_1_96_standard_errors_has_p_of_five_per_cent() -> None:
    assert won.Difference(1.959964, 1.0, 10).p == pytest.approx(0.05, abs=1e-6)
    assert won.Difference(0.0, 0.0, 10).p == 1.0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12), st.booleans())
def test_the_front_is_what_no_trial_beats_in_both(points: list[tuple[int, int]], lower: bool) -> None:
    rows = [Row({"nfe": nfe, "value/q": float(q), "number": i}) for i, (nfe, q) in enumerate(points)]
    sign = 1 if lower else -1
    found = {(row.data["nfe"], row.value("q")) for row in cost.pareto(rows, "q", lower)}
    for nfe, q in points:
        beaten = any(n <= nfe and sign * v <= sign * q and (n, v) != (nfe, q) for n, v in points)
        assert ((nfe, float(q)) in found) == (not beaten)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=10))
def test_what_is_undominated_in_two_objectives_is_what_none_beats(points: list[tuple[int, int]]) -> None:
    view = SimpleNamespace(is_lower=lambda name: name == "a")
    rows = [Row({"value/a": float(a), "value/b": float(b), "number": 0}) for a, b in points]
    found = {(row.value("a"), row.value("b")) for row in search._undominated(rows, ["a", "b"], view)}  # type: ignore[arg-type]
    for a, b in points:
        beaten = any(c <= a and d >= b and (c, d) != (a, b) for c, d in points)
        assert ((a, b) in found) == (not beaten)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = svg.ticks(low, low + width, False)
    slack = 1e-6 * (abs(low) + width)
    assert 2 <= len(found) <= 12 and all(low - slack <= t <= low + width + slack for t in found)


def odd_chart(log: bool = False) -> Chart:
    y = [1.0, math.nan, 3.0, math.inf, -1.0]
    bad = Series(ODD + "\x00", [1, 2, 3, 4, 5], y, [0.5, None, math.nan, 1, -2], [2, 3, 4, 5, 0], [ODD] * 5)
    return Chart("c", ODD, ODD, ODD, [bad, Series("empty", [], [])], log_y=log, ticks_x=[1, 2])


@pytest.mark.parametrize("log", [False, True])
def test_a_drawing_is_sound_xml_whatever_it_is_given(log: bool) -> None:
    root = ET.fromstring(svg.draw(odd_chart(log)))
    assert root.get("aria-label") == ODD
    assert "nan" not in ET.tostring(root, encoding="unicode").replace("not a number", "")
    bars = Chart("b", ODD, "share", "", [Series("s", [0.2, math.nan], [ODD, "x"])], bars=True)
    ET.fromstring(svg.draw(bars))
    ET.fromstring(svg.draw(Chart("e", "nothing", "x", "y", [Series("s", [], [])], log_x=True)))


@pytest.mark.parametrize("log", [False, True])
def test_plotly_gets_json_without_nan_and_names_without_markup(log: bool) -> None:
    text = json.dumps(odd_chart(log).plotly(), allow_nan=False)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert json.loads(text)["data"][0]["x"] == ([1, 3] if log else [1, 3, 5])


def test_pictures_of_mixed_sizes_share_a_sheet_without_being_stretched() -> None:
    small, wide = Image.new("RGB", (2, 2), "#ff0000"), Image.new("RGB", (8, 4), "#00ff00")
    uri, width, height = samples.sprite([small, wide, small], 2)
    sheet = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
    assert (width, height) == (8, 4) and sheet.size == (16, 8)
    assert (np.asarray(sheet) == [255, 0, 0]).all(axis=-1).sum() == 8
    assert sheet.getpixel((3, 1)) == (255, 0, 0) and sheet.getpixel((8, 0)) == (0, 255, 0)
    large, width, height = samples.sprite([Image.new("RGB", (512, 256))], 1)
    assert large.startswith("data:image/webp") and (width, height) == (96, 48)


def test_paired_effects_keep_their_rows_when_some_are_in_quarantine(finished: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    view = open_view(str(root), "tiny")
    first, second, *_ = view.complete
    Store(root).quarantine(first.data["key"], 5, "it killed its worker")
    judge = won.Judge("quality/frechet", view)
    effects = judge.effects(first).rows
    assert math.isnan(effects[5]) and np.isfinite(effects).sum() == 63
    assert judge.difference(first, second).shared == 64


def test_trials_of_other_seeds_are_never_paired(finished: Path) -> None:
    view = open_view(str(finished), "tiny")
    first, second, *_ = view.complete
    recipe = json.dumps(second.recipe | {"seed": 7})
    assert won.Judge("quality/frechet", view).difference(first, Row(second.data | {"recipe": recipe})).shared == 0


def test_text_in_a_script_element_cannot_end_it() -> None:
    text = build._json({"a": "</script><!--&"})
    assert "<" not in text and json.loads(text) == {"a": "</script><!--&"}


def test_scores_that_are_not_numbers_are_null() -> None:
    assert samples._finite(np.array([1.0, math.nan, -math.inf])) == [1.0, None, None]


def test_samples_without_pictures_are_told_by_their_numbers() -> None:
    assert samples._texts(np.array([[0.5, -1.25]])) == ["0.5 -1.25"]
    assert samples._texts(np.zeros((1, 40)))[0].endswith("…")


def test_the_browser_holds_as_many_pictures_as_its_budget_allows(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    found = SimpleNamespace(first=0, labels=[0], scores={}, texts=[], prompts=[], pictures=[picture])
    monkeypatch.setattr(samples, "_read", lambda *args, **more: found)
    (all_of_them,) = samples.browser(open_view(str(finished), "tiny"))
    monkeypatch.setattr(samples, "BROWSER_BYTES", 500)
    (fewer,) = samples.browser(open_view(str(finished), "tiny"))
    assert all_of_them.browser is not None and fewer.browser is not None
    assert len(all_of_them.browser["trials"]) == 4 and len(fewer.browser["trials"]) == 1
    assert fewer.text.startswith("1 of 4 trials")
