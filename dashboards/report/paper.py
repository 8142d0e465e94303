"""Charts and tables as files for a paper: PDF or SVG by matplotlib, CSV and LaTeX."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dashboards.report.chart import Chart, Series
from dashboards.report.table import Table

FORMATS = ("pdf", "svg", "png")
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "cross": "P", "triangle-up": "^", "x": "X"}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 7, "lines.linewidth": 1.2, "lines.markersize": 4,
    "pdf.fonttype": 42,  # letters stay letters, which journals ask for
    "svg.fonttype": "none", "svg.hashsalt": "solvus", "text.parse_math": False, "axes.unicode_minus": False,
}  # fmt: skip
SIZE = (4.8, 3.2)  # inches


def save(charts: Iterable[Chart], tables: Iterable[Table], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write every chart and table under its name; two of one name are numbered.

    Returns:
        the files, in order.

    Raises:
        ValueError: the folder cannot be written.
    """
    files: list[Path] = []
    taken: dict[str, int] = {}

    def place(name: str) -> Path:
        taken[name] = taken.get(name, 0) + 1
        return folder / (name if taken[name] == 1 else f"{name}_{taken[name]}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            drawn, stem = draw(chart), place(chart.name)
            for kind in formats:
                files.append(stem.with_name(f"{stem.name}.{kind}"))
                # Without a date, so that the same study gives the same bytes.
                stamp = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font has not is a box
                    import matplotlib

                    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
                        drawn.savefig(files[-1], bbox_inches="tight", dpi=200, metadata=stamp)
        for table in tables:
            stem = place(table.name)
            for kind, text in (("csv", table.csv()), ("tex", table.latex())):
                files.append(stem.with_name(f"{stem.name}.{kind}"))
                files[-1].write_text(text)
    except OSError as error:
        raise ValueError(f"--out {str(folder)!r} cannot be written: {error.strerror}. Give another folder.") from None
    return files


def draw(chart: Chart) -> Any:
    """The chart as a matplotlib figure, made without pyplot: no window, no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        if chart.log_x:
            axes.set_xscale("log")
        if chart.log_y:
            axes.set_yscale("log")
        for series in chart.series:
            (_bars if chart.bars else _series)(axes, chart, series)
        if chart.ticks_x:
            axes.set_xticks(list(chart.ticks_x), [f"{tick:g}" for tick in chart.ticks_x])
            axes.minorticks_off()
        if len(chart.series) > 1:
            # A leading underscore would hide a name from the legend.
            handles = [line for line in axes.get_lines() if line.get_gid() == "series"]
            names = [series.label.lstrip("_") or "_" for series in chart.series if chart.points(series)]
            axes.legend(handles, names, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return figure


def _series(axes: Any, chart: Chart, series: Series) -> None:
    points = chart.points(series)
    if not points:
        return
    x, y = [p[0] for p in points], [p[1] for p in points]
    line = ("--" if series.dashed else "-") if series.lines else "none"
    marker = MARKERS.get(series.symbol, "o") if series.markers else "none"
    style = {"drawstyle": "steps-post"} if series.step else {}
    axes.plot(x, y, linestyle=line, marker=marker, color=series.colour, gid="series", **style)
    if series.low is not None:
        low = [0.0 if p[2] is None else p[1] - p[2] for p in points]
        high = [0.0 if p[3] is None else p[3] - p[1] for p in points]
        axes.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=series.colour, elinewidth=0.8)


def _bars(axes: Any, chart: Chart, series: Series) -> None:
    points = chart.points(series)
    axes.barh(range(len(points)), [p[0] for p in points], color=series.colour)
    axes.set_yticks(range(len(points)), [str(p[1]) for p in points])
