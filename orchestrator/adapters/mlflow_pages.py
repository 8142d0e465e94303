"""What MLflow's pages show of a study beside numbers: a description with the main table, charts, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from orchestrator import rows
from orchestrator.store import CorruptShard, Store
from tasks.intervals import Z95
from tasks.types import sample_shape

VIEW = "solvus"  # the key of the shared view, as links carry it
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
MOST_ROWS = 40
PICTURE_SIDE = 64  # pixels of a sample's longer side, at least


def sampler(described: Mapping[str, Any]) -> str:
    """A recipe's sampler in a few words: solver and grid, and what else is not plain."""
    solver = described["solver"]
    found = [str(solver.get("scheduler") or solver.get("preset") or solver["name"]), described["times"]["name"]]
    for kind, plain in (("initial", "prior"), ("guidance", "none"), ("strategy", "single")):
        name = described.get(kind, {"name": plain})["name"]
        found += [name] if name != plain else []
    return " ".join(found)


def ranked(trials: Iterable[Any], goal: tuple[str, str]) -> list[tuple[int, Any]]:
    """(rank at its cost, trial) of every trial that has the value, by cost and then by rank; 0 is the best.

    Trials that a race stopped have values on fewer samples and are left out.
    """
    name, better = goal
    sign = 1 if better == "lower" else -1
    pool = [t for t in trials if t.state != "failed" and not t.stopped and name in t.values]
    pool.sort(key=lambda trial: (trial.nfe, sign * trial.values[name], trial.number))
    found: list[tuple[int, Any]] = []
    for trial in pool:
        rank = found[-1][0] + 1 if found and found[-1][1].nfe == trial.nfe else 0
        found.append((rank, trial))
    return found


def description(question: str, trials: list[Any], goal: tuple[str, str] | None, experiment: str) -> str:
    """Markdown for people: the question, where the charts are, and which sampler is how good at which cost."""
    lines = [question or "No question was given.", ""]
    table = [] if goal is None else ranked(trials, goal)
    if goal is None or not table:
        return "\n".join([*lines, "No trial has a value yet."])
    link = f"#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={VIEW}"
    name, better = goal
    lines += [f"[Charts: which sampler at which cost]({link})", ""]
    lines += [f"| NFE | sampler | {name} ({better} is better) | samples | device-s a sample | trial |"]
    lines += ["|--:|---|--:|--:|--:|---|"]
    shown = sorted(table, key=lambda entry: (entry[0], entry[1].nfe))[:MOST_ROWS]
    for rank, trial in sorted(shown, key=lambda entry: (entry[1].nfe, entry[0])):
        value = f"{trial.values[name]:.4g}"
        value += f" ± {Z95 * trial.errors[name]:.2g}" if trial.errors.get(name) else ""
        what = _cell(sampler(trial.described()))
        mark = "**" if rank == 0 else ""
        seconds = "" if trial.seconds is None else f"{trial.seconds:.3g}"
        where = _cell(f"#{trial.number} {trial.part} {trial.proposal.baseline}")
        row = [
            f"{trial.nfe:g}",
            f"{mark}{what}{mark}",
            f"{mark}{value}{mark}",
            f"{trial.num_samples:,}",
            seconds,
            where,
        ]
        lines.append(f"| {' | '.join(row)} |")
    failed = sum(trial.state == "failed" for trial in trials)
    left_out = f" The best {len(shown)} of {len(table)} are shown." if len(shown) < len(table) else ""
    lines += [
        "",
        f"Bold: the best at its cost; ± is a 95 % interval.{left_out} {failed} of {len(trials)} trials failed. "
        "Compare values at equal numbers of samples only; the best of many is too good by its selection.",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that cannot leave its cell of a Markdown table or start markup of its own."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(text.split()))


def chart_view(goal: tuple[str, str], pictures_at: int | None) -> str:
    """The state of MLflow's chart page, as its "share" button keeps it in a tag: the study's own charts come first.

    Args:
        goal: name and direction of the value that decides.
        pictures_at: step of the sample pictures; None where there are none.
    """
    name, better = goal

    def chart(kind: str, **fields: Any) -> dict[str, Any]:
        plain = {"type": kind, "metricSectionId": VIEW, "deleted": False, "isGenerated": False, "displayName": ""}
        return {"uuid": f"{VIEW}-{kind.lower()}", "runsCountToCompare": 100} | plain | fields

    charts = [
        chart("SCATTER", xaxis={"key": "cost/nfe", "type": "METRIC"}, yaxis={"key": name, "type": "METRIC"}),
        chart("PARALLEL", selectedParams=["sampler", "nfe"], selectedMetrics=[name], showAllRuns=True),
        chart("BAR", metricKey=name),
    ]
    if pictures_at is not None:
        charts.append(chart("IMAGE", imageKeys=["samples"], step=pictures_at, showRunParams=False))
    section = {"uuid": VIEW, "name": "Which sampler at which cost", "display": True, "isReordered": False,
               "deleted": False, "isGenerated": False}  # fmt: skip
    state = {
        "searchFilter": "tags.`solvus.trial` LIKE '%/%'",
        "orderByKey": f"metrics.`{name}`",
        "orderByAsc": better == "lower",
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [
            "attributes.`Dataset`", "params.`sampler`", "params.`nfe`", f"metrics.`{name}`", f"metrics.`{name}_se`",
            "metrics.`cost/seconds`",
        ],
        "compareRunSections": [section],
        "isAccordionReordered": True,  # or else MLflow sorts sections by name and puts its own "cost" above this one
        "compareRunCharts": charts,
    }  # fmt: skip
    return json.dumps(state)


def picture(trial: Any, store: Store, count: int) -> np.ndarray | None:
    """The first samples of a trial side by side, (H, W) or (H, W, 3), uint8; None where there are no images.

    Equal indices in every trial: equal starting noise and equal labels.
    """
    model = trial.recipe.parts.model
    if model.kind != "image" or not trial.num_samples or not count:
        return None
    first = trial.first_index
    try:
        tables = list(store.read("rows", trial.recipe.key, first, min(first + count, trial.stop)))
    except (KeyError, CorruptShard):  # rows that were set aside or removed since; a picture is not worth more
        return None
    images = np.concatenate([rows.samples(table, sample_shape(model)) for table in tables])  # (B, C, H, W) in [-1, 1]
    pixels = rows.to_bytes(images)
    side = max(images.shape[2:])
    grow, shrink = max(PICTURE_SIDE // side, 1), max(side // (4 * PICTURE_SIDE), 1)
    pixels = pixels[:, :, ::shrink, ::shrink].repeat(grow, axis=2).repeat(grow, axis=3)
    strip = np.concatenate(list(np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))), axis=2)  # (C, H, B * W)
    return strip[0] if len(strip) == 1 else np.moveaxis(strip, 0, -1)


def datasets(trial: Any) -> list[tuple[str, str, str, str]]:
    """(context, name, digest, source) of what a trial compares with and of the sample indices it rests on.

    Trials with the same indices are paired, so MLflow's grouping by dataset shows what may be compared.
    """
    recipe = trial.recipe
    if not trial.num_samples:
        return []
    indices = {"seed": recipe.seed, "first_index": trial.first_index, "num_samples": trial.num_samples}
    name = f"samples {trial.first_index}-{trial.stop} of seed {recipe.seed}"
    span = f"{recipe.seed}-{trial.first_index}-{trial.stop}"
    revision = str(recipe.parts.model.revision)[:36]
    return [
        ("samples", name, span[:36], json.dumps(indices)),
        ("model", recipe.model["name"], revision, json.dumps(recipe.model)),
    ]


def improvements(trials: Iterable[Any], goal: tuple[str, str]) -> list[tuple[str, float, int]]:
    """(metric, value, trials so far) whenever a part's best value improved: its search history, as it went."""
    name, better = goal
    sign = 1 if better == "lower" else -1
    best: dict[str, float] = {}
    counts: dict[str, int] = {}
    found = []
    for trial in trials:
        counts[trial.part] = counts.get(trial.part, 0) + 1
        value = trial.values.get(name)
        if trial.state == "failed" or trial.stopped or value is None:
            continue
        if trial.part not in best or sign * value < sign * best[trial.part]:
            best[trial.part] = value
            found.append((_key(f"best/{trial.part or 'all'}/{name}"), value, counts[trial.part]))
    return found


def _key(text: str) -> str:
    """A metric key that MLflow takes."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", text)[:250]
