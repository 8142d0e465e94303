"""The report's figures, as plotly objects."""

from __future__ import annotations

from typing import Any

from dashboards.report.view import Z95, Row, best_by_nfe

COLOURS = ["#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"]


def _figure(title: str, x: str, y: str, **layout: Any) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        template="plotly_white",
        height=440,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        legend={"orientation": "h", "y": -0.2},
        **layout,
    )
    return figure


def quality_against_nfe(rows: list[Row], name: str, lower: bool) -> Any:
    """Each solver with its best grid: value with its 95 % interval against evaluations."""
    figure = _figure(f"{name} against network evaluations", "network evaluations per sample", name)
    series = best_by_nfe(rows, name, lower)
    for i, (label, points) in enumerate(series.items()):
        figure.add_scatter(
            x=[row.nfe for row in points],
            y=[row.value(name) for row in points],
            error_y={"type": "data", "array": [Z95 * row.error(name) for row in points], "thickness": 1},
            text=[f"{row.grid} grid, {row.data['num_samples']} samples" for row in points],
            mode="lines+markers" if len(points) > 1 else "markers",
            marker={"size": 12 if len(points) == 1 else 7, "symbol": "star" if "searched" in label else "circle"},
            name=label,
            line={"color": COLOURS[i % len(COLOURS)]},
        )
    figure.update_xaxes(type="log", tickvals=sorted({row.nfe for row in rows}))
    values = [row.measured(name) for row in rows if row.value(name) is not None]
    if values and min(values) > 0 and max(values) / min(values) > 8:
        figure.update_yaxes(type="log")
    return figure


def search_history(rows: list[Row], name: str, lower: bool) -> Any:
    """Every trial of a search against what was spent so far, and the best that went all the way."""
    figure = _figure(f"search history: {rows[0].data['part']}", "network evaluations spent", name)
    spent: list[float] = []
    for row in rows:
        spent.append((spent[-1] if spent else 0.0) + (row.data.get("cost/nfe") or 0.0))
    kinds = {
        "baseline": [i for i, row in enumerate(rows) if row.baseline and not row.stopped],
        "trial": [i for i, row in enumerate(rows) if not row.baseline and not row.stopped],
        "stopped by the race (estimate)": [i for i, row in enumerate(rows) if row.stopped],
    }
    for (label, places), colour in zip(kinds.items(), (COLOURS[1], "#64748b", "#cbd5e1"), strict=True):
        if places:
            values = [rows[i].data.get("estimate") or rows[i].measured(name) for i in places]
            titles = [rows[i].baseline or f"trial {rows[i].data['number']}" for i in places]
            figure.add_scatter(
                x=[spent[i] for i in places], y=values, text=titles, mode="markers", name=label,
                marker={"color": colour},
            )  # fmt: skip
    best: list[float] = []
    full = [i for i, row in enumerate(rows) if not row.stopped]
    for i in full:
        value = rows[i].measured(name)
        best.append(value if not best else (min if lower else max)(best[-1], value))
    figure.add_scatter(
        x=[spent[i] for i in full], y=best, mode="lines", name="best so far", line={"color": COLOURS[0], "shape": "hv"}
    )
    values = [row.measured(name) for row in rows]
    if min(values) > 0 and max(values) / min(values) > 8:
        figure.update_yaxes(type="log")
    return figure


def importances(shares: dict[str, float], name: str) -> Any:
    """How much of an objective's variance each parameter explains."""
    figure = _figure(f"importance of the parameters for {name}", "share of the variance (fANOVA)", "")
    shown = list(shares.items())[:20][::-1]
    figure.add_bar(
        x=[value for _, value in shown], y=[path for path, _ in shown], orientation="h", marker={"color": COLOURS[0]}
    )
    return figure


def front(rows: list[Row], held: list[Row], names: list[str]) -> Any:
    """All trials in the plane of the first two objectives, with the winners on held-out samples."""
    figure = _figure(f"{names[0]} against {names[1]}", names[1], names[0])
    for label, members, colour in (("trial", rows, "#94a3b8"), ("front, held out", held, COLOURS[0])):
        points = sorted(members, key=lambda row: row.measured(names[1]))
        if points:
            figure.add_scatter(
                x=[row.measured(names[1]) for row in points],
                y=[row.measured(names[0]) for row in points],
                error_y={"type": "data", "array": [Z95 * row.error(names[0]) for row in points], "thickness": 1},
                text=[row.baseline or f"trial {row.data['number']}" for row in points],
                mode="markers" if members is rows else "lines+markers",
                name=label,
                marker={"color": colour},
            )
    return figure


def curves(series: dict[str, list[Any]], title: str, y: str) -> Any:
    """Estimates against k, label -> [(k, Estimate)], with their intervals."""
    figure = _figure(title, "candidates k", y)
    for i, (label, points) in enumerate(series.items()):
        figure.add_scatter(
            x=[k for k, _ in points],
            y=[e.value for _, e in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [e.high - e.value for _, e in points],
                "arrayminus": [e.value - e.low for _, e in points],
                "thickness": 1,
            },
            mode="lines+markers",
            name=label,
            line={"color": COLOURS[i % len(COLOURS)]},
        )
    figure.update_xaxes(type="log", tickvals=sorted({k for points in series.values() for k, _ in points}))
    return figure


def schedules(rows: list[Row], process: Any) -> Any:
    """Time grids drawn over each other: half log-SNR at every step (t where it is infinite)."""
    import math

    figure = _figure("time grids", "step", "half log-SNR, log(alpha / sigma)")
    for i, row in enumerate(rows):
        inner = [(step, process.lam(t)) for step, t in enumerate(row.times) if t > 0]
        finite = [(step, lam) for step, lam in inner if math.isfinite(lam)]
        figure.add_scatter(
            x=[step for step, _ in finite],
            y=[lam for _, lam in finite],
            text=[f"t={row.times[step]:.4f}" for step, _ in finite],
            mode="lines+markers",
            name=f"{row.solver}, {row.grid}",
            line={"color": COLOURS[i % len(COLOURS)], "width": 4 if row.grid == "searched" else 2},
        )
    figure.update_xaxes(dtick=1)
    return figure


def best_of_n(rows: list[Row], names: list[str]) -> list[Any]:
    """Each reward and quality against the number of candidates."""
    figures = []
    for name in names:
        points = [row for row in sorted(rows, key=lambda r: r.particles) if row.value(name) is not None]
        if not points:
            continue
        figure = _figure(f"best of N: {name}", "candidates N", name)
        figure.add_scatter(
            x=[row.particles for row in points],
            y=[row.value(name) for row in points],
            error_y={"type": "data", "array": [Z95 * row.error(name) for row in points], "thickness": 1},
            text=[f"{row.data['nfe']} evaluations per sample" for row in points],
            mode="lines+markers",
            name=name,
            line={"color": COLOURS[0]},
        )
        figure.update_xaxes(type="log", tickvals=[row.particles for row in points])
        figures.append(figure)
    return figures
