"""Prompts from a file: text, CSV, TSV, JSON lines, Parquet, or a Hugging Face dataset saved on disk.

Row i of a study has the prompt of row ``i mod n`` of the file, whatever shard makes it. Rows keep their order, their
ids and their groups; a prompt that occurs twice is two rows.
"""

from __future__ import annotations

import csv
import hashlib
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
    elif place.suffix not in SUFFIXES:
        raise ValueError(f"prompts {path!r} ends in {place.suffix!r}; allowed: {', '.join(SUFFIXES)}.")
    elif place.suffix == ".parquet":
        rows, first = _parquet(place), "row"
    else:
        rows, first = _lines(place), "line"
    if not rows:
        raise ValueError(f"{path} holds no prompts.")
    return _checked(path, rows, first)


def _checked(path: str, rows: Table, unit: str) -> Prompts:
    header = {str(name).strip().lower(): str(name) for name in rows[0][1]}
    prompt, number, group = (next((header[n] for n in names if n in header), None) for names in (PROMPT, ID, GROUP))
    if prompt is None:
        raise ValueError(f"{path} has no column {' or '.join(PROMPT)}; found: {', '.join(header.values())}.")
    bad = [(n, row.get(prompt)) for n, row in rows if not isinstance(row.get(prompt), str) or not row[prompt].strip()]
    if bad:
        shown = ", ".join(f"{unit} {n} ({value!r})" for n, value in bad[:SHOWN])
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"{path}: {prompt} must be text and not empty, unlike {shown}{more}. Mend these rows.")

    def column(name: str | None, instead: list[str]) -> tuple[str, ...]:
        return tuple(instead) if name is None else tuple("" if r.get(name) is None else str(r[name]) for _, r in rows)

    texts = tuple(str(row[prompt]).strip() for _, row in rows)
    return Prompts(texts, column(number, [str(i) for i in range(len(rows))]), column(group, [""] * len(rows)))


def _lines(place: Path) -> Table:
    """Rows of a text file with the number of the line on which each ends, from 1."""
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = place.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}: line {line} is not UTF-8 text. Save the file as UTF-8.") from None
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if place.suffix == ".txt":
        return [(n, {"prompt": line}) for n, line in enumerate(lines, 1)]
    return _json_lines(place, lines) if place.suffix == ".jsonl" else _separated(place, text)


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
    reader = csv.reader(text.splitlines(keepends=True), delimiter="\t" if place.suffix == ".tsv" else ",", strict=True)
    rows: Table = []
    try:
        header = next(reader, [])
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
        return list(enumerate(pq.ParquetFile(place).read(use_threads=False).to_pylist()))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{place} cannot be read as Parquet: {error}.") from None


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
