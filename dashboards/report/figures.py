"""The report's figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dashboards.report.chart import COLOURS, GREY, SYMBOLS, Chart, Series
from dashboards.report.view import Row, best_by_nfe
from tasks.intervals import Z95


def slug(text: str) -> str:
    """Text as a name of a file."""
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in text).lower().split()
    return "_".join(words)[:80] or "figure"


def _look(i: int) -> dict[str, Any]:
    return {"colour": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)]}


def _wide(values: list[float]) -> bool:
    """Whether values are better seen on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 8


def _measured(
    label: str, rows: list[Row], name: str, x: Callable[[Row], float], text: list[str], **look: Any
) -> Series:
    """Values of trials with their 95 % intervals."""
    values = [row.measured(name) for row in rows]
    halves = [Z95 * row.error(name) for row in rows]
    return Series(
        label, [x(row) for row in rows], values, [v - h for v, h in zip(values, halves, strict=True)],
        [v + h for v, h in zip(values, halves, strict=True)], text, **look,
    )  # fmt: skip


def quality_against_nfe(rows: list[Row], name: str, lower: bool) -> Chart:
    """Each solver with its best grid: value with its 95 % interval against evaluations."""
    series = []
    for i, (label, points) in enumerate(best_by_nfe(rows, name, lower).items()):
        text = [f"{row.grid} grid, {row.data['num_samples']} samples" for row in points]
        size = 12 if len(points) == 1 else 7
        series.append(_measured(label, points, name, lambda row: row.nfe, text, size=size, **_look(i)))
    return Chart(
        f"{slug(name)}_by_solver", f"{name} by solver", "network evaluations per sample", name, series, log_x=True,
        log_y=_wide([row.measured(name) for row in rows if row.value(name) is not None]),
        ticks_x=sorted({row.nfe for row in rows}),
    )  # fmt: skip


def pareto(rows: list[Row], front: list[Row], name: str) -> Chart:
    """All trials in the plane of cost and quality, and those that no other one beats in both."""

    def said(found: list[Row]) -> list[str]:
        return [row.label for row in found]

    def total(row: Row) -> float:
        return row.data["nfe"]

    inside = {id(row) for row in front}
    others = [row for row in rows if id(row) not in inside]
    series = [_measured("other trials", others, name, total, said(others), lines=False, colour=GREY, size=5)]
    series.append(_measured("Pareto front", front, name, total, said(front), step=True, symbol="diamond", size=9))
    return Chart(
        f"{slug(name)}_pareto", f"{name} against cost: the Pareto front",
        "network evaluations per sample, all candidates counted", name, [s for s in series if s.x], log_x=True,
        log_y=_wide([row.measured(name) for row in rows]),
    )  # fmt: skip


def search_history(rows: list[Row], name: str, lower: bool) -> Chart:
    """Every trial of a search against what was spent so far, and the best that went all the way."""
    spent: list[float] = []
    for row in rows:
        spent.append((spent[-1] if spent else 0.0) + (row.data.get("cost/nfe") or 0.0))
    kinds = {
        "baseline": [i for i, row in enumerate(rows) if row.baseline and not row.stopped],
        "trial": [i for i, row in enumerate(rows) if not row.baseline and not row.stopped],
        "stopped by the race (estimate)": [i for i, row in enumerate(rows) if row.stopped],
    }
    series = []
    looks = ((COLOURS[1], "square"), (GREY, "circle"), (GREY, "x"))
    for (label, places), (colour, symbol) in zip(kinds.items(), looks, strict=True):
        if places:
            values = [rows[i].data.get("estimate") or rows[i].measured(name) for i in places]
            titles = [rows[i].name for i in places]
            series.append(
                Series(
                    label, [spent[i] for i in places], values, text=titles, lines=False, colour=colour, symbol=symbol
                )
            )
    best: list[float] = []
    full = [i for i, row in enumerate(rows) if not row.stopped]
    for i in full:
        value = rows[i].measured(name)
        best.append(value if not best else (min if lower else max)(best[-1], value))
    series.append(Series("best so far", [spent[i] for i in full], best, markers=False, step=True))
    title = f"search history: {rows[0].data['part']}"
    log = _wide([row.measured(name) for row in rows])
    return Chart(slug(title), title, "network evaluations spent", name, series, log_y=log)


def importances(shares: dict[str, float], name: str, part: str) -> Chart:
    """How much of an objective's variance each parameter explains."""
    shown = list(shares.items())[:20][::-1]
    bars = Series(name, [value for _, value in shown], [path for path, _ in shown])
    title = f"importance of the parameters for {name}"
    return Chart(slug(f"importance_{part}"), title, "share of the variance (fANOVA)", "", [bars], bars=True)


def front(rows: list[Row], held: list[Row], names: list[str]) -> Chart:
    """All trials in the plane of the first two objectives, with the winners on held-out samples."""
    series = []
    for label, members, look in (
        ("trial", rows, {"colour": GREY, "lines": False}),
        ("front, held out", held, {"symbol": "diamond", "size": 9}),
    ):
        points = sorted(members, key=lambda row: row.measured(names[1]))
        if points:
            text = [row.name for row in points]
            series.append(_measured(label, points, names[0], lambda row: row.measured(names[1]), text, **look))
    title = f"{names[0]} against {names[1]}"
    return Chart(slug(f"front_{rows[0].data['part']}"), title, names[1], names[0], series)


def curves(name: str, series: dict[str, list[Any]], title: str, y: str, laws: dict[str, Any] | None = None) -> Chart:
    """Estimates against k, label -> [(k, Estimate)], with their intervals; and fitted laws, label -> law, dashed."""
    drawn = []
    for i, (label, points) in enumerate(series.items()):
        ks = [k for k, _ in points]
        low, high = [e.low for _, e in points], [e.high for _, e in points]
        drawn.append(Series(label, ks, [e.value for _, e in points], low, high, **_look(i)))
        law = (laws or {}).get(label)
        if law is not None:
            steps = [ks[0] * (ks[-1] / ks[0]) ** (j / 40) for j in range(41)]
            fit = f"fit: {law.limit:.3g} - {law.gain:.3g} k^-{law.power:.2g}"
            colour = COLOURS[i % len(COLOURS)]
            drawn.append(Series(fit, steps, [law(k) for k in steps], markers=False, dashed=True, colour=colour))
    ticks = sorted({k for points in series.values() for k, _ in points})
    return Chart(name, title, "candidates k", y, drawn, log_x=True, ticks_x=ticks)


def schedules(rows: list[Row], process: Any) -> Chart:
    """Time grids drawn over each other: half log-SNR at every step (t where it is infinite)."""
    series = []
    for i, row in enumerate(rows):
        inner = [(step, process.lam(t)) for step, t in enumerate(row.times) if t > 0]
        finite = [(step, lam) for step, lam in inner if math.isfinite(lam)]
        text = [f"t={row.times[step]:.4f}" for step, _ in finite]
        wide = 4 if row.grid == "searched" else 2
        label = f"{row.solver}, {row.grid}"
        steps, lams = [step for step, _ in finite], [lam for _, lam in finite]
        series.append(Series(label, steps, lams, text=text, width=wide, **_look(i)))
    return Chart("schedules", "time grids", "step", "half log-SNR, log(alpha / sigma)", series)


def best_of_n(part: str, rows: list[Row], names: list[str]) -> list[Chart]:
    """Each reward and quality against the number of candidates."""
    found = []
    for name in names:
        points = [row for row in sorted(rows, key=lambda r: r.particles) if row.value(name) is not None]
        if points:
            text = [f"{row.data['nfe']} evaluations per sample" for row in points]
            series = _measured(name, points, name, lambda row: row.particles, text)
            place = slug(f"best_of_n_{part}_{name}")
            ticks = [row.particles for row in points]
            found.append(Chart(place, f"best of N: {name}", "candidates N", name, [series], log_x=True, ticks_x=ticks))
    return found
