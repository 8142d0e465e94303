"""Whatever a study's folder holds, its report is a page that says what is missing."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dashboards.report import build
from orchestrator.store import Store

EVIL = "</script><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>"


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished root that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def page(root: Path, name: str = "tiny") -> str:
    """The page's text, after what must hold for every one."""
    text = Path(build.write(str(root), name)).read_text()
    for island in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.S):
        json.loads(island, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert text.rstrip().endswith("</html>") and "Provenance" in text
    for asset in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert asset.startswith(("data:", "#")), asset
    return text


def edit(root: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = root / "studies" / "tiny" / "trials.parquet"
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


def replace_rows(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite the stored rows of every trial."""
    store = Store(root)
    for data in pq.read_table(root / "studies" / "tiny" / "trials.parquet").to_pylist():
        key = data["key"]
        found = pa.concat_tables(store.read("rows", key, 0, 64)).combine_chunks()
        for record in store.committed("rows", key):
            store.withdraw("rows", key, record)
        store.put("rows", key, 0, 64, change(found), {}, {})


def notices(text: str) -> list[str]:
    return re.findall(r'<p class="notice">(.*?)</p>', text, re.S)


def test_a_sound_study_has_no_notices(root: Path) -> None:
    assert notices(page(root)) == []


def test_a_store_of_another_version_costs_samples_not_the_page(root: Path) -> None:
    (root / "store" / "FORMAT.json").write_text('{"format": 99}')
    text = page(root)
    (notice,) = notices(text)
    assert "has store format 99, this version reads format 1" in notice
    assert "At 3 evaluations" in text and "All trials" in text and "(unpaired)" in text


def test_a_root_without_a_store_says_so(root: Path) -> None:
    shutil.rmtree(root / "store")
    assert "there is no store" in notices(page(root))[0]


@pytest.mark.parametrize("gone", [("baseline", "stopped", "estimate", "looks", "quarantined"), ("times",), ("recipe",)])
def test_a_trial_table_of_another_version_has_a_page(root: Path, gone: tuple[str, ...]) -> None:
    edit(root, lambda table: [{k: v for k, v in row.items() if k not in gone} for row in table])
    assert "All trials" in page(root)


@pytest.mark.parametrize("file", ["study.json", "trials.parquet", "search.json", "state.json"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(root: Path, file: str) -> None:
    (root / "studies" / "tiny" / file).write_bytes(b"{damaged")
    text = page(root)
    if file in ("study.json", "trials.parquet"):
        assert "damaged" in notices(text)[0]


def test_a_metric_that_is_not_known_here_is_named(root: Path) -> None:
    path = root / "studies" / "tiny" / "study.json"
    config = json.loads(path.read_text())
    config["metrics"] = [{"name": "of_the_future"}, *config["metrics"]]
    path.write_text(json.dumps(config))
    assert "of_the_future" in " ".join(notices(page(root)))


def test_nan_in_a_column_is_left_out_and_said(root: Path) -> None:
    def broken(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | ({"value/quality/frechet": math.nan, "se/quality/kid": math.nan} if i == 1 else {})
                for i, row in enumerate(table)]  # fmt: skip

    edit(root, broken)
    text = page(root)
    assert notices(text) == ["quality/frechet is not a number in trial 1: left out wherever it would count."]
    assert "At 3 evaluations" in text and "At 5 evaluations" in text


def test_a_column_of_nan_alone_has_a_page(root: Path) -> None:
    names = ("value/quality/frechet", "value/quality/kid", "cost/generate_s")
    edit(root, lambda table: [row | dict.fromkeys(names, math.nan) for row in table])
    text = page(root)
    assert len(notices(text)) == 2 and "All trials" in text


def test_markup_in_prompts_parts_and_labels_stays_text(root: Path) -> None:
    replace_rows(root, lambda table: table.append_column("prompt", pa.array([EVIL] * table.num_rows)))
    edit(root, lambda table: [row | {"part": EVIL, "title": EVIL, "baseline": EVIL, "commit": EVIL} for row in table])
    text = page(root)
    assert "<script>alert" not in text and "<img src=http" not in text
    island = json.loads(re.findall(r'id="samples">(.*?)</script>', text, re.S)[0])
    assert island["trials"][0]["prompts"][0] == EVIL and EVIL in island["trials"][0]["title"]


def test_ten_thousand_labels_and_pictures_of_mixed_sizes_and_damaged_ones(root: Path) -> None:
    def png(size: tuple[int, int]) -> bytes:
        sink = io.BytesIO()
        Image.new("L", size, 200).save(sink, format="PNG")
        return sink.getvalue()

    def change(table: pa.Table) -> pa.Table:
        pictures = [{"bytes": png((8 + i % 3 * 20, 8)), "path": None} for i in range(table.num_rows)]
        pictures[3]["bytes"] = b"no picture"
        labels = pa.array([i * 157 % 10_000 for i in range(table.num_rows)])
        return table.append_column("image", pa.array(pictures)).set_column(
            table.column_names.index("label"), "label", labels
        )

    replace_rows(root, change)
    text = page(root)
    island = json.loads(re.findall(r'id="samples">(.*?)</script>', text, re.S)[0])
    trial = island["trials"][0]
    assert max(trial["labels"]) == 63 * 157 and (trial["width"], trial["height"]) == (48, 8)
    sheet = Image.open(io.BytesIO(base64.b64decode(trial["sprite"].split(",")[1])))
    assert sheet.size == (trial["columns"] * 48, math.ceil(64 / trial["columns"]) * 8)


def test_rows_in_quarantine_are_listed_with_their_reasons(root: Path) -> None:
    edit(root, lambda table: [row | {"quarantined": json.dumps({"9": EVIL})} for row in table])
    text = page(root)
    assert "Quarantined rows" in text and "&lt;img src=http" in text and "<img src=http" not in text


def test_the_command_line_writes_the_page_of_a_damaged_study(root: Path, solvus: Callable[..., Any]) -> None:
    (root / "studies" / "tiny" / "study.json").write_bytes(b"{damaged")
    done = solvus("report", "name=tiny", f"root={root}", "--json")
    assert done.code == 0 and "damaged" in Path(done.data["report"]).read_text()


def test_the_command_of_the_provenance_runs_and_makes_nothing_twice(root: Path, solvus: Callable[..., Any]) -> None:
    command = html.unescape(re.findall(r"Again, exactly: (solvus run .*?)</li>", page(root))[0])
    path = root / "studies" / "tiny" / "study.json"
    path.write_text(path.read_text().replace(json.dumps(json.loads(path.read_text())["root"]), json.dumps(str(root))))
    done = solvus(*shlex.split(command)[1:], "--json")
    assert done.code == 0, done.err
    assert done.data["samples_made"] == 0 and done.data["samples_reused"] == 256
    assert f"Last launched by: {command}" in html.unescape(page(root))


def test_a_study_that_is_not_there_is_an_error_and_not_a_page(root: Path) -> None:
    with pytest.raises(ValueError, match="no study in"):
        build.write(str(root), "nothing")
