"""Solvus from Python: run a study, open a finished one, and read no more of it than is asked for.

from orchestrator import open_study, run

study = run("study=tiny", "num_samples=1024")
study = open_study("tiny")
study.trials().to_pandas()
study.rows(columns=["trial", "label", "ink"], where=[("trial", "in", [0, 3]), ("ink", ">", 0.2)])
study.samples(trial=3).show()
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator import measure
from orchestrator.files import is_remote
from orchestrator.plan import aside, covered, missing
from orchestrator.results import Results
from orchestrator.store import Store
from tasks.recipe import Recipe

Condition = tuple[str, str, Any]
OPERATORS = {
    "==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
    "in": lambda column, values: pc.is_in(column, value_set=pa.array(list(values))),
}  # fmt: skip
PICTURES = ("image", "x0")  # large: read only when they are named


def run(*overrides: str, config_dir: Sequence[str] = ()) -> OpenStudy:
    """Run a study here, or continue it, as ``solvus run`` does.

    Args:
        overrides: as on the command line: ``"study=tiny"``, ``"solver=heun"``, ``"root=DIR"``.
        config_dir: folders of your own with study/NAME.yaml files.

    Returns:
        the finished study. Failed trials are no error: see column ``state`` of its trials.

    Raises:
        ValueError: an override is wrong, or a trial cannot run.
    """
    from dashboards.report import build
    from orchestrator import config
    from orchestrator.launch import launch

    study = config.study(config.compose(list(overrides), list(config_dir)))
    launch(study, " ".join(["solvus", "run", *overrides]), build.write)
    return open_study(study.name, study.root)


def open_study(name: str, root: str | Path | None = None) -> OpenStudy:
    """A study that has been run.

    Args:
        name: its name.
        root: where it was written; the configured root (``$SOLVUS_ROOT``) when left out.

    Raises:
        ValueError: there is no such study, or its store is of another version.
    """
    if root is None:
        from orchestrator import config

        root = config.root_of(config.compose([], []))
    results = Results(str(root), name)
    return OpenStudy(name, results.study(), results, Store(root, create=False))


@dataclass(frozen=True)
class OpenStudy:
    """A stored study. ``config`` is what was asked for, as plain data."""

    name: str
    config: dict[str, Any]
    results: Results = field(repr=False)
    store: Store = field(repr=False)

    @property
    def report(self) -> str:
        """Where its report lies."""
        return f"{self.results.folder}/report.html"

    def trials(self) -> pa.Table:
        """One row a trial: number, part, state, recipe, values as ``value/NAME``, their standard errors ``se/NAME``."""
        return self._trials

    @cached_property
    def _trials(self) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(self.results.files.read("trials.parquet"))).read(use_threads=False)

    def best(self) -> dict[str, Any]:
        """The winner of its last search.

        Raises:
            ValueError: it has no search that finished a trial.
        """
        return self.results.best()

    def rows(self, columns: Sequence[str] | None = None, where: Sequence[Condition] = ()) -> pa.Table:
        """Samples with their scores, of all trials that have values, one row a sample of a trial.

        Only the columns that are named, here or in a condition, are read, and of trials that conditions on ``trial``
        leave. Checksums are not looked at: ``solvus verify`` does that.

        Args:
            columns: ``trial`` (its number), ``sample_id``, ``label``, ``nfe``, ..., scorers by name (``ink``; features
                are lists), ``image`` and ``x0``. None: all but the last two and the features.
            where: ``(column, operator, value)``, all of which must hold; operators ``== != < <= > >= in``.

        Raises:
            ValueError: a column or an operator that does not exist.
            KeyError: rows that are not in the store any more. Run the study again to make them.
        """
        for name, operator, _ in where:
            if operator not in OPERATORS:
                raise ValueError(f"unknown operator {operator!r} for {name}. Allowed: {' '.join(OPERATORS)}.")
        found = [self._of_trial(data, columns, where) for data in self._chosen(where)]
        found = [table for table in found if table is not None]
        if not found:
            return pa.table({name: [] for name in columns or ["trial", "sample_id"]})
        return pa.concat_tables(found, promote_options="permissive")

    def _chosen(self, where: Sequence[Condition]) -> Iterator[dict[str, Any]]:
        """The trials that have values and that conditions on their number leave."""
        names = ["number", "key", "first_index", "num_samples", "state"]
        for data in self._trials.select(names).to_pylist() if self._trials.num_rows else []:
            number = pa.table({"trial": [data["number"]]})
            is_wanted = _holds(number, [c for c in where if c[0] == "trial"]).num_rows > 0
            if is_wanted and data["state"] in ("complete", "degraded"):
                yield data

    def _of_trial(
        self, data: dict[str, Any], columns: Sequence[str] | None, where: Sequence[Condition]
    ) -> pa.Table | None:
        key, first = data["key"], data["first_index"]
        spec = self.store.get_json("recipes", key)
        if spec is None:
            raise KeyError(f"the store does not know recipe {key}. Run the study again to make its rows.")
        recipe = Recipe(**spec)
        scorers = {spec["name"]: spec for spec in measure.scorers(measure.completed(self.config.get("metrics") or []))}
        stop = first + data["num_samples"]
        schema = self._schema(key)
        shown = [n for n in schema if n not in PICTURES] + list(scorers) if columns is None else list(columns)
        wanted = list(dict.fromkeys([*shown, *(name for name, _, _ in where)]))
        unknown = [name for name in wanted if name not in ("trial", *schema, *scorers)]
        if unknown:
            there = ", ".join(["trial", *schema, *scorers])
            raise ValueError(f"trial {data['number']} has no column {unknown[0]!r}. It has: {there}.")
        out = self.store.quarantined(key)
        table = self._read("rows", key, ["sample_id", *(n for n in wanted if n in schema)], first, stop, out)
        table = table.append_column("trial", pa.array([data["number"]] * table.num_rows, pa.int64()))
        for name in wanted:
            if name in scorers:
                place, out = recipe.column_key(scorers[name]), aside(recipe, [scorers[name]], self.store)
                column = self._read("columns", place, ["sample_id", "value"], first, stop, out)
                if columns is None and pa.types.is_fixed_size_list(column["value"].type):
                    shown = [n for n in shown if n != name]
                    continue
                table = _joined(table, column, name)
        kept = _holds(table, where)
        return kept.select(["trial", *shown] if columns is None else shown) if kept.num_rows else None

    def _schema(self, key: str) -> list[str]:
        record = self.store.first_record("rows", key)
        if record is None:
            raise KeyError(f"rows of {key} are not in the store. Run the study again to make them.")
        return pq.read_schema(self._source("rows", key, record.file)).names

    def _read(self, kind: str, key: str, columns: Sequence[str], start: int, stop: int, out: Iterable[int]) -> pa.Table:
        """The committed rows of a range, each once, in order of their index, without those that were set aside.

        Raises:
            KeyError: some are missing that were not.
        """
        records = self.store.committed(kind, key)
        if lacking := missing(start, stop, covered(records, out)):
            gaps = ", ".join(f"{low}-{high}" for low, high in lacking[:5])
            raise KeyError(f"{kind} {gaps} of {key} are not in the store. Run the study again to make them.")
        position, parts = start, []
        for record in records:
            low, high = max(record.start, position), min(record.stop, stop)
            if low < high:
                whole = pq.ParquetFile(self._source(kind, key, record.file)).read(
                    list(dict.fromkeys(columns)), use_threads=False
                )
                parts.append(whole.slice(low - record.start, high - low))
                position = high
        return pa.concat_tables(parts, promote_options="default")

    def _source(self, kind: str, key: str, file: str) -> Any:
        """Something that Parquet reads in parts: a place here, or the bytes of a remote file."""
        name = f"{self.store.folder(kind, key)}/{file}"
        remote = is_remote(self.store.root)
        return io.BytesIO(self.store.files.read(name)) if remote else Path(self.store.root) / "store" / name

    def samples(self, trial: int, count: int = 64) -> Samples:
        """The first pictures of a trial.

        Raises:
            ValueError: no such trial, or one that makes no pictures.
            KeyError: they are not in the store any more.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        known = {data["number"]: data for data in self._chosen(())}
        if trial not in known:
            raise ValueError(f"study {self.name} has no complete trial {trial!r}. It has: {_listed(list(known))}.")
        data = known[trial]
        if "image" not in self._schema(data["key"]):
            raise ValueError(
                f"trial {trial} makes no pictures. Its samples are numbers: "
                f"rows(columns=['x0'], where=[('trial', '==', {trial})])."
            )
        key, first = data["key"], data["first_index"]
        stop, out = first + min(count, data["num_samples"]), self.store.quarantined(key)
        table = self._read("rows", key, ["sample_id", "label", "image"], first, stop, out)
        from PIL import Image

        pictures = [Image.open(io.BytesIO(item["bytes"])) for item in table["image"].to_pylist()]
        return Samples(trial, table["sample_id"].to_pylist(), table["label"].to_pylist(), pictures)


@dataclass(frozen=True)
class Samples:
    """Pictures of a trial, with their indices and labels (-1 for none). A notebook shows them as a grid."""

    trial: int
    indices: list[int]
    labels: list[int]
    images: list[Any] = field(repr=False)

    def show(self, columns: int | None = None, zoom: int | None = None) -> Any:
        """One PIL image of all of them, row by row; a notebook shows it where it is a cell's last line.

        Args:
            columns: of the grid; a square when left out.
            zoom: times that every pixel is repeated; as many as make small pictures 32 pixels wide when left out.
        """
        from PIL import Image

        across = columns or math.ceil(math.sqrt(len(self.images)))
        width, height = (max(image.size[i] for image in self.images) for i in (0, 1))
        times = zoom or max(1, 32 // max(width, height))
        gap = 1
        size = (across * (width + gap) - gap, math.ceil(len(self.images) / across) * (height + gap) - gap)
        sheet = Image.new("RGB", size, "#888888")
        for i, image in enumerate(self.images):
            left, top = i % across * (width + gap), i // across * (height + gap)
            sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        return sheet.resize((sheet.width * times, sheet.height * times), Image.Resampling.NEAREST)

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.show().save(sink, format="PNG")
        return sink.getvalue()


def _holds(table: pa.Table, where: Sequence[Condition]) -> pa.Table:
    """The rows for which all conditions hold; a missing value fulfils none."""
    for name, operator, value in where:
        table = table.filter(OPERATORS[operator](table[name], value))
    return table


def _joined(table: pa.Table, column: pa.Table, name: str) -> pa.Table:
    """A scorer's column beside its rows, by index: either may lack rows that were set aside."""
    ours, theirs = (np.asarray(t["sample_id"]) for t in (table, column))
    _, here, there = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    return table.take(pa.array(here)).append_column(name, column["value"].take(pa.array(there)))


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return (shown + (" …" if len(numbers) > 20 else "")) or "none"
