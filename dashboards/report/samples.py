"""Samples at equal index: strips that need no script, and the data of the browser.

Pictures of a trial lie in one image, cell beside cell, because that is several times smaller than one file each.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dashboards.report.study import GONE, Section, StudyView
from dashboards.report.view import Row, best_by_nfe, compared, parts
from orchestrator import measure, rows

GRID_COLUMNS, GRID_TRIALS = 20, 12
BROWSER_TRIALS, BROWSER_SAMPLES = 24, 128
BROWSER_BYTES = 4_000_000  # of pictures, as they stand in the page
BROWSER_PIXELS = 60_000_000  # that are decoded at most, so that large pictures take seconds and not minutes
LARGEST_CELL = 96
SHOWN_NUMBERS = 16
PLUMBING = {"sample_id", "label", "seed", "image", "x0", "seconds"}


@dataclass(frozen=True)
class Samples:
    """Consecutive samples of a trial: pictures or, where the model makes none, their numbers as text."""

    row: Row
    first: int
    labels: list[int]
    pictures: list[Any]
    texts: list[str]
    scores: dict[str, list[float | None]]
    prompts: list[str]


def strips(view: StudyView) -> list[Section]:
    """The first samples of the trials that matter, one row a trial."""
    pictures = []
    for row in chosen(view)[:GRID_TRIALS]:
        found = _read(view, row, GRID_COLUMNS, scored=False)
        if found is None or not found.pictures:
            continue
        uri, width, height = sprite(found.pictures, len(found.pictures))
        labels = "labels " + " ".join(map(str, found.labels)) if max(found.labels, default=-1) >= 0 else "no labels"
        last = found.first + len(found.pictures) - 1
        said = f"samples {found.first} to {last} of {row.label}; {labels}"
        count = len(found.pictures)
        pictures.append({"title": row.label, "uri": uri, "alt": said, "width": width * count, "height": height,
                         "labels": labels, "first": found.first, "last": last})  # fmt: skip
    if not pictures:
        return []
    text = f"The same {GRID_COLUMNS} sample indices in every row: equal starting noise, equal labels."
    if len({picture["first"] for picture in pictures}) > 1:
        text += " Rows of other indices (held-out samples, or another part) say so."
    return [Section("Samples at equal index", text, pictures=pictures)]


def browser(view: StudyView) -> list[Section]:
    """Samples with their scores, to be sorted and filtered, two trials side by side."""
    trials: list[dict[str, Any]] = []
    spent, limit = 0, BROWSER_SAMPLES
    ranked = chosen(view)
    for row in ranked[:BROWSER_TRIALS]:
        found = _read(view, row, limit, scored=True)
        if found is None:
            continue
        data: dict[str, Any] = {
            "title": row.label, "first": found.first, "labels": found.labels, "scores": found.scores,
            "texts": found.texts, "prompts": found.prompts,
        }  # fmt: skip
        if found.pictures:
            columns = math.ceil(math.sqrt(len(found.pictures)))
            data["sprite"], data["width"], data["height"] = sprite(found.pictures, columns)
            data["columns"] = columns
            spent += len(data["sprite"])
            if trials and spent > BROWSER_BYTES:
                break
            pixels = max(picture.size[0] * picture.size[1] for picture in found.pictures)
            limit = max(GRID_COLUMNS, min(limit, BROWSER_PIXELS // (pixels * BROWSER_TRIALS)))
        trials.append(data)
    if not trials:
        return []
    there = max(len(trial["labels"]) for trial in trials)
    text = (
        f"{len(trials)} of {len(view.complete)} trials, the first {there} samples of each; the store has all of them. "
        "Sort by any score, filter by label or prompt, and compare two trials at the same index."
    )
    return [Section("Sample browser", text, browser={"trials": trials})]


def chosen(view: StudyView) -> list[Row]:
    """The trials to look at: the best of each solver, cheapest and dearest first; several candidates; then the rest."""
    found: list[Row] = []
    pool = compared(view.table)
    if view.qualities:
        name = view.qualities[0]
        series = best_by_nfe(pool, name, view.is_lower(name))
        searched = [row for members in series.values() for row in members if row.grid == "searched"]
        wanted = {row.nfe for row in searched} or {min((row.nfe for row in pool), default=0)}
        wanted.add(max((row.nfe for row in pool), default=0))
        found = [row for members in series.values() for row in members if row.nfe in wanted]
    found += [row for members in parts(view.table).values() for row in members if row.particles > 1]
    return list({(row.data["key"], *row.span): row for row in [*found, *view.complete]}.values())


def _read(view: StudyView, row: Row, count: int, scored: bool) -> Samples | None:
    """The first samples of a trial; None where they are gone. Rows in quarantine end it early."""
    key, (first, there) = row.data["key"], row.span
    stop = first + min(count, there)
    out = [index for index in view.store.quarantined(key) if first <= index < stop]
    stop = min([stop, *out])
    if stop <= first:
        return None
    try:
        table = pa.concat_tables(view.store.read("rows", key, first, stop), promote_options="default")
    except (*GONE, pa.ArrowInvalid):
        return None
    labels = [int(label) for label in rows.to_numpy(table["label"])]
    pictures = _pictures(table) if "image" in table.column_names else []
    texts = [] if pictures or "x0" not in table.column_names else _texts(rows.to_numpy(table["x0"]))
    prompts = [str(p) for p in table["prompt"].to_pylist()] if "prompt" in table.column_names else []
    scores = _scores(view, row, table, first, stop) if scored else {}
    return Samples(row, first, labels, pictures, texts, scores, prompts)


def _pictures(table: pa.Table) -> list[Any]:
    """Decoded pictures; one that cannot be read is an empty cell."""
    from PIL import Image

    found = []
    for item in table["image"].to_pylist():
        try:
            found.append(Image.open(io.BytesIO(item["bytes"])).convert("RGB"))
        except (OSError, TypeError, ValueError):
            found.append(Image.new("RGB", (1, 1), "#888888"))
    return found


def _texts(values: np.ndarray) -> list[str]:
    flat = values.reshape(len(values), -1)
    more = " …" if flat.shape[1] > SHOWN_NUMBERS else ""
    return [" ".join(f"{v:.4g}" for v in sample[:SHOWN_NUMBERS]) + more for sample in flat]


def _scores(view: StudyView, row: Row, table: pa.Table, first: int, stop: int) -> dict[str, list[float | None]]:
    """Every number that a row has: what scorers said, and what the strategy left."""
    found = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if name not in PLUMBING and (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            found[name] = _finite(rows.to_numpy(table[name]))
    try:
        recipe, needs = view.recipe(row), measure.scorers(measure.completed(view.config["metrics"]))
    except GONE:
        return found
    for spec in needs:
        try:
            column = pa.concat_tables(view.store.read("columns", recipe.column_key(spec), first, stop, ["value"]))
        except (*GONE, pa.ArrowInvalid):
            continue
        if not pa.types.is_fixed_size_list(column["value"].type):  # features are no score
            found[spec["name"]] = _finite(rows.to_numpy(column["value"]))
    return {name: values for name, values in found.items() if len(values) == stop - first}


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.astype(np.float64)]


def sprite(pictures: list[Any], columns: int) -> tuple[str, int, int]:
    """Pictures of any sizes in one image, row by row, each in the middle of its cell.

    Returns:
        a data URI, and width and height of a cell in pixels. Small cells keep every bit; larger ones are WebP.
    """
    from PIL import Image

    largest = max(max(picture.size) for picture in pictures)
    shrink = min(1.0, LARGEST_CELL / largest)
    fitted = [
        p if shrink == 1 else p.resize((max(1, round(p.width * shrink)), max(1, round(p.height * shrink))))
        for p in pictures
    ]
    width, height = max(p.width for p in fitted), max(p.height for p in fitted)
    sheet = Image.new("RGB", (columns * width, math.ceil(len(fitted) / columns) * height), "#888888")
    for i, picture in enumerate(fitted):
        left, top = i % columns * width, i // columns * height
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
    small = max(width, height) <= 32
    sink = io.BytesIO()
    if small:
        sheet.save(sink, format="PNG", optimize=True)
    else:
        sheet.save(sink, format="WEBP", quality=85)
    kind = "png" if small else "webp"
    return f"data:image/{kind};base64," + base64.b64encode(sink.getvalue()).decode(), width, height
