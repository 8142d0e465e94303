"""Prompts from a file: text, CSV, TSV, JSON lines, Parquet, or a Hugging Face dataset saved on disk.

Row i of a study has the prompt of row ``i mod n`` of the file, whatever shard makes it. Rows keep their order, their
ids and their groups; a prompt that occurs twice is two rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

# Column names, without regard to case. PartiPrompts has Prompt and Category; DrawBench has Prompts and Category.
PROMPT = ("prompt", "prompts", "text", "caption")
ID = ("prompt_id", "id", "promptid", "idx")
GROUP = ("group", "category")
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
SHOWN = 5

Table = list[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Prompts:
    """The rows of a prompt file.

    Attributes:
        texts: one prompt a row.
        ids: the file's own ids as text, or the number of the row, from 0.
        groups: the file's own groups as text; empty where it has none.
    """

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over everything that rows of a study say of their prompts."""
        data = json.dumps([self.texts, self.ids, self.groups], ensure_ascii=False)
        return hashlib.sha256(data.encode()).hexdigest()[:16]


def read(path: str) -> Prompts:
    """The prompts of a file, read again only when it changed.

    Args:
        path: a file with one of the known suffixes, or the folder of a saved dataset. Columns are found by name:
            the prompt by prompt, prompts, text or caption; prompt_id or id, and group or category may be there.

    Raises:
        ValueError: no such file, a format or column that is not known, or rows without a prompt, by their numbers.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"prompts {path!r} does not exist. Give a {', '.join(SUFFIXES)} file, or a saved dataset.")
    files = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    return _read(str(place), tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=8)
def _read(path: str, stamp: tuple[tuple[str, int, int], ...]) -> Prompts:
    place = Path(path)
    if place.is_dir():
        rows, first = _saved_dataset(place), "row"
    elif place.suffix.lower() not in SUFFIXES:
        raise ValueError(f"prompts {path!r} ends in {place.suffix!r}; allowed: {', '.join(SUFFIXES)}.")
    elif place.suffix.lower() == ".parquet":
        rows, first = _parquet(place), "row"
    else:
        rows, first = _lines(place), "line"
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    return _checked(path, rows, first)


def _checked(path: str, rows: Table, unit: str) -> Prompts:
    header = {str(name).strip().lower(): str(name) for name in rows[0][1]}
    # A line of JSON need not have what a later one has.
    every = {str(name).strip().lower(): str(name) for _, row in rows for name in row} | header
    prompt = next((header[n] for n in PROMPT if n in header), None)
    number, group = (next((every[n] for n in names if n in every), None) for names in (ID, GROUP))
    if prompt is None:
        raise ValueError(f"{path} has no column {' or '.join(PROMPT)}; found: {', '.join(header.values())}.")
    bad = [(n, row.get(prompt)) for n, row in rows if not isinstance(row.get(prompt), str) or not row[prompt].strip()]
    if bad:
        shown = ", ".join(f"{unit} {n} ({value!r})" for n, value in bad[:SHOWN])
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path}: {prompt} must be text and not empty, unlike {shown}{more}. Mend these rows.")

    for n, row in rows:
        for name in filter(None, (prompt, number, group)):
            if not _is_text(str(row.get(name))):
                raise ValueError(
                    f"{path}: {name} of {unit} {n} holds half a character (a lone surrogate), {row[name]!r}, which no "
                    "file can keep. Mend this row."
                )

    def column(name: str | None, instead: list[str]) -> tuple[str, ...]:
        return tuple(instead) if name is None else tuple("" if r.get(name) is None else str(r[name]) for _, r in rows)

    texts = tuple(str(row[prompt]).strip() for _, row in rows)
    return Prompts(texts, column(number, [str(i) for i in range(len(rows))]), column(group, [""] * len(rows)))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_header(place: Path, header: Iterable[str]) -> None:
    """Refuse a column that is there twice where it matters: which of them is meant?"""
    names = [str(name).strip().lower() for name in header]
    if twice := [name for name in (*PROMPT, *ID, *GROUP) if names.count(name) > 1]:
        raise ValueError(f"{place} has {names.count(twice[0])} columns {twice[0]!r}. Keep the one that is meant.")


def _lines(place: Path) -> Table:
    """Rows of a text file with the number of the line on which each ends, from 1.

    Lines end at line feeds and carriage returns alone, not at what else Unicode calls a line end: prompts may hold it.
    """
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = place.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}: line {line} is not UTF-8 text. Save the file as UTF-8.") from None
    lines = [line.rstrip("\r\n") for line in io.StringIO(text, newline="")]
    while lines and not lines[-1].strip():
        lines.pop()
    if place.suffix.lower() == ".txt":
        return [(n, {"prompt": line}) for n, line in enumerate(lines, 1)]
    return _json_lines(place, lines) if place.suffix.lower() == ".jsonl" else _separated(place, text)


def _json_lines(place: Path, lines: Iterable[str]) -> Table:
    rows: Table = []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: line {n} is not JSON: {error}.") from None
        if not isinstance(row, str | dict):
            raise ValueError(f"{place}: line {n} must be an object or a text, got {line[:80]!r}.")
        rows.append((n, {"prompt": row} if isinstance(row, str) else row))
    return rows


def _separated(place: Path, text: str) -> Table:
    mark = "\t" if place.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows: Table = []
    try:
        header = next(reader, [])
        _check_header(place, header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{place}: line {reader.line_num} has {len(cells)} fields, the header {len(header)}. Put prompts "
                    "with separators in quotes."
                )
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{place}: line {reader.line_num} cannot be read: {error}.") from None
    return rows


def _parquet(place: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(place).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{place} cannot be read as Parquet: {error}.") from None
    _check_header(place, table.column_names)
    return list(enumerate(table.to_pylist()))


def _saved_dataset(place: Path) -> Table:
    """Rows of a dataset written by ``Dataset.save_to_disk``; its Arrow files need no further package."""
    import pyarrow as pa

    if (place / "dataset_dict.json").is_file():
        splits = json.loads((place / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{place} holds several splits: {', '.join(splits)}. Give one of them, {place / splits[0]}.")
    try:
        state = json.loads((place / "state.json").read_text())
        tables = [pa.ipc.open_stream(place / item["filename"]).read_all() for item in state["_data_files"]]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{place} is no dataset saved with save_to_disk: {error!r}.") from None
    if state.get("_indices_files"):
        raise ValueError(f"{place} is a selection of rows by index. Call flatten_indices() before save_to_disk.")
    return list(enumerate(row for table in tables for row in table.to_pylist()))
