"""The Python API: what is in the store, no more of it than asked for, and imported only when used."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import orchestrator
from orchestrator import api, open_study, rows, run
from orchestrator.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a study of two trials of 24 pictures, in two ranges each, scored by ``ink``."""
    root = tmp_path_factory.mktemp("api")
    study = run(
        "model=digits", "name=digits", "solver=ddim", "nfe=1", "metrics=[{name:mean_reward,reward:ink}]",
        "search=grid", "search.space={seed:[0,1]}", "num_samples=24", "batch_size=12", "shard_size=12",
        "tracker=none", f"root={root}",
    )  # fmt: skip
    assert study.name == "digits" and Path(study.report).exists()
    return root


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """(file, columns) of everything that is read from Parquet."""
    calls: list[tuple[str, Any]] = []

    class Counted(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, source: Any) -> None:
            super().__init__(source)
            self.named = str(source)

        def read(self, columns: Any = None, **more: Any) -> pa.Table:
            calls.append((self.named, columns))
            return super().read(columns, **more)

    monkeypatch.setattr(api.pq, "ParquetFile", Counted)
    yield calls


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc, which Linux has")
def test_reading_starts_no_threads_of_arrow(digits: Path) -> None:
    """Beside torch they end one process in four with an abort, at its exit, after all its work."""
    code = f"""
import os
from orchestrator import open_study, rows
from orchestrator.results import Results
from orchestrator.store import Store
import orchestrator.api, numpy, torch
before = len(os.listdir("/proc/self/task"))
study = open_study("digits", root={str(digits)!r})
trials, found = study.trials(), study.rows(columns=["nfe"])
key = Results({str(digits)!r}, "digits").trials()[0]["key"]
tables = list(Store({str(digits)!r}, create=False).read("rows", key, 0, 24))
print(len(trials), len(found), len(tables), len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *counts, threads = map(int, done.stdout.split())
    assert counts == [2, 48, 2]
    assert threads < 2 + pa.cpu_count()  # one that reads and one that frees memory, but no pool of as many as cores


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, orchestrator; print(sorted({'torch', 'pyarrow', 'numpy', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = orchestrator.nothing  # type: ignore[attr-defined]


def test_trials_are_the_stored_table(digits: Path) -> None:
    table = open_study("digits", digits).trials()
    assert table.equals(pq.read_table(digits / "studies" / "digits" / "trials.parquet"))
    assert len(table.to_pandas()) == 2


def test_rows_are_those_of_the_store_in_order(digits: Path) -> None:
    study, store = open_study("digits", digits), Store(digits)
    table = study.rows(columns=["trial", "sample_id", "ink", "x0"])
    assert table.column_names == ["trial", "sample_id", "ink", "x0"] and table.num_rows == 48
    for data in study.trials().to_pylist():
        mine = table.filter(pa.compute.equal(table["trial"], data["number"]))
        stored = pa.concat_tables(store.read("rows", data["key"], 0, 24))
        assert np.array_equal(rows.to_numpy(mine["x0"]), rows.to_numpy(stored["x0"]))
        assert np.mean(mine["ink"].to_numpy()) == pytest.approx(data["value/reward/ink"], abs=1e-6)


def test_only_what_is_asked_for_is_read(digits: Path, read: list[tuple[str, Any]]) -> None:
    study = open_study("digits", digits)
    (_, second) = study.trials()["key"].to_pylist()
    read.clear()
    table = study.rows(columns=["label"], where=[("trial", "==", 1), ("ink", ">", -1)])
    assert table.column_names == ["label"] and table.num_rows == 24
    assert {columns for _, found in read for columns in found} == {"sample_id", "label", "value"}
    assert all(second in file for file, _ in read if "/rows/" in file) and len(read) == 4


def test_pictures_and_states_are_read_only_when_named(digits: Path) -> None:
    study = open_study("digits", digits)
    names = study.rows().column_names
    assert names[0] == "trial" and {"label", "nfe", "ink"} <= set(names) and not {"image", "x0"} & set(names)
    assert study.rows(columns=["image"]).column_names == ["image"]


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ([("label", "==", 3)], lambda label, ink: label == 3),
        ([("label", "in", [1, 2]), ("ink", "<=", 0.0)], lambda label, ink: label in (1, 2) and ink <= 0),
        ([("label", "!=", 3), ("label", "<", 5), ("label", ">=", 2)], lambda label, ink: label in (2, 4)),
    ],
)
def test_conditions_keep_what_fulfils_them_all(digits: Path, where: list[Any], keep: Any) -> None:
    study = open_study("digits", digits)
    every = study.rows(columns=["trial", "sample_id", "label", "ink"]).to_pylist()
    found = study.rows(columns=["trial", "sample_id"], where=where).to_pylist()
    wanted = [{k: row[k] for k in ("trial", "sample_id")} for row in every if keep(row["label"], row["ink"])]
    assert found == wanted


def test_no_row_left_is_an_empty_table_with_the_columns(digits: Path) -> None:
    study = open_study("digits", digits)
    for where in ([("label", "==", 99)], [("trial", "==", 99)]):
        table = study.rows(columns=["label", "ink"], where=where)
        assert table.column_names == ["label", "ink"] and table.num_rows == 0


def test_samples_show_as_a_grid_of_the_stored_pictures(digits: Path) -> None:
    found = open_study("digits", digits).samples(trial=1, count=6)
    assert found.indices == [0, 1, 2, 3, 4, 5] and found.labels == [0, 1, 2, 3, 4, 5]
    sheet = found.show(columns=3, zoom=2)
    assert sheet.size == (2 * (3 * 9 - 1), 2 * (2 * 9 - 1))
    fifth = sheet.crop((18, 18, 34, 34)).resize((8, 8), Image.Resampling.NEAREST).convert("L")
    assert fifth.tobytes() == found.images[4].tobytes()
    assert Image.open(io.BytesIO(found._repr_png_())).format == "PNG"
    assert "images" not in repr(found)


def test_mistakes_are_told_with_what_is_allowed(digits: Path, finished: Path) -> None:
    study = open_study("digits", digits)
    with pytest.raises(ValueError, match="no column 'inc'. It has: trial, sample_id, .*ink"):
        study.rows(columns=["inc"])
    with pytest.raises(ValueError, match="unknown operator '~' for label. Allowed: == != < <= > >= in"):
        study.rows(where=[("label", "~", 1)])
    with pytest.raises(ValueError, match="no complete trial 7. It has: 0, 1"):
        study.samples(trial=7)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        study.samples(trial=0, count=0)
    with pytest.raises(ValueError, match=r"makes no pictures. .*columns=\['x0'\]"):
        open_study("tiny", finished).samples(trial=0)
    with pytest.raises(ValueError, match="no study in"):
        open_study("nothing", digits)


def test_features_are_lists_and_come_when_named(finished: Path) -> None:
    study = open_study("tiny", finished)
    assert "identity" not in study.rows().column_names
    table = study.rows(columns=["identity"], where=[("trial", "==", 0)])
    assert table.num_rows == 64 and pa.types.is_fixed_size_list(table["identity"].type)


def test_rows_in_quarantine_are_not_among_them(digits: Path, tmp_path: Path) -> None:
    """Scores of other rows stay beside their own rows."""
    import shutil

    shutil.copytree(digits, tmp_path / "copy")
    study, store = open_study("digits", tmp_path / "copy"), Store(tmp_path / "copy")
    key = study.trials()["key"][0].as_py()
    whole = study.rows(columns=["sample_id", "ink"], where=[("trial", "==", 0)])
    first, *_ = store.committed("rows", key)
    table = pa.concat_tables(store.read("rows", key, 0, 12))
    store.withdraw("rows", key, first)
    for start, stop in ((0, 5), (6, 12)):
        store.put("rows", key, start, stop, table.slice(start, stop - start), {}, {})
    store.quarantine(key, 5, "it killed its worker")
    left = study.rows(columns=["sample_id", "ink"], where=[("trial", "==", 0)])
    assert left.to_pylist() == [row for row in whole.to_pylist() if row["sample_id"] != 5]


def test_a_range_that_is_gone_is_told_and_never_left_out(digits: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(digits, tmp_path / "copy")
    study, store = open_study("digits", tmp_path / "copy"), Store(tmp_path / "copy")
    key = study.trials()["key"][0].as_py()
    store.withdraw("rows", key, store.committed("rows", key)[-1])
    with pytest.raises(KeyError, match=f"rows 12-24 of {key} are not in the store. Run the study again"):
        study.rows(columns=["sample_id"], where=[("trial", "==", 0)])
    with pytest.raises(KeyError, match="rows 12-20"):
        study.samples(0, count=20)
    assert len(study.samples(0, count=12).indices) == 12


@pytest.mark.parametrize("name", ["../../outside", "a/b", ".hidden", ""])
def test_no_name_leads_out_of_the_root(solvus: Any, digits: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name becomes a folder"):
        open_study(name, digits)
    refused = solvus("report", f"name={name}", f"root={digits}")
    assert refused.code == 2 and "name" in refused.err


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "report.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/report.md", "exec"), {})
