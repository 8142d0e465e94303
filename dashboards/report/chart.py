"""A figure as plain data: what is drawn, for a page that is interactive, one that is not, and for paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dashboards.report.table import Table

# Each is told apart from its neighbours in print too, and has a contrast of 3:1 and more on white and on near-black.
COLOURS = ["#2f6fde", "#c2630a", "#0a8a5f", "#d6404a", "#8a5cf0", "#0a87a8", "#c93d8c", "#5f8517"]
GREY = "#7c8797"
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")


@dataclass(frozen=True)
class Series:
    """One thing drawn: points (x, y), both of equal length, with what to say of each.

    Args:
        low, high: ends of each point's interval, or None for no interval; single ones may be None too.
        lines, markers: whether points are joined, and shown.
        step: join them by steps, each y until the next x.
    """

    label: str
    x: Sequence[Any]
    y: Sequence[Any]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    text: Sequence[str] = ()
    lines: bool = True
    markers: bool = True
    step: bool = False
    dashed: bool = False
    colour: str = COLOURS[0]
    symbol: str = "circle"
    size: int = 7
    width: int = 2


@dataclass(frozen=True)
class Chart:
    """Axes and series. ``name`` is what its file is called; ``bars`` draws horizontal bars of x, labelled by y."""

    name: str
    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    ticks_x: Sequence[float] = ()
    bars: bool = False

    def points(self, series: Series) -> list[tuple[Any, Any, float | None, float | None, str]]:
        """(x, y, low, high, text) of what can be drawn: finite, and positive where an axis is logarithmic."""
        found = []
        count = len(series.x)
        ends = zip(series.low or [None] * count, series.high or [None] * count, strict=True)
        texts = list(series.text) or [""] * count
        for x, y, (low, high), text in zip(series.x, series.y, ends, texts, strict=True):
            if drawable(x, self.log_x) and (self.bars or drawable(y, self.log_y)):
                held = [e if e is not None and drawable(e, self.log_y) else None for e in (low, high)]
                found.append((x, y, held[0], held[1], text))
        return found

    def table(self) -> Table:
        """The same numbers as a table, for who cannot see the figure or wants to draw it anew."""
        rows = [
            [series.label, x, y, low, high, text]
            for series in self.series
            for x, y, low, high, text in self.points(series)
        ]
        return Table(self.name, self.title, ["series", self.x, self.y or "name", "low", "high", "what"], rows)

    def plotly(self) -> dict[str, Any]:
        """The figure in plotly's words: data and layout, with no number that JSON cannot say."""
        data = [self._trace(series) for series in self.series]
        layout: dict[str, Any] = {
            "title": {"text": escape(self.title), "font": {"size": 15}},
            "height": max(420, 60 + 26 * len(self.series[0].y)) if self.bars and self.series else 420,
            "margin": {"l": 70, "r": 16, "t": 44, "b": 48},
            "legend": {"orientation": "h", "y": -0.2},
            "hovermode": "closest",
            "xaxis": {"title": {"text": escape(self.x)}, "type": "log" if self.log_x else "-"},
            "yaxis": {"title": {"text": escape(self.y)}, "type": "log" if self.log_y else "-"},
        }
        if self.ticks_x:
            layout["xaxis"] |= {"tickvals": list(self.ticks_x), "ticktext": [f"{t:g}" for t in self.ticks_x]}
        if self.bars:
            layout["yaxis"] |= {"type": "category", "automargin": True}
        return {"data": data, "layout": layout}

    def _trace(self, series: Series) -> dict[str, Any]:
        points = self.points(series)
        trace: dict[str, Any] = {
            "x": [p[0] for p in points],
            "y": [escape(p[1]) if isinstance(p[1], str) else p[1] for p in points],
            "name": escape(series.label),
            "text": [escape(p[4]) for p in points],
        }
        if self.bars:
            return trace | {"type": "bar", "orientation": "h", "marker": {"color": series.colour}}
        if series.low is not None:
            trace["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": [0 if p[3] is None else p[3] - p[1] for p in points],
                "arrayminus": [0 if p[2] is None else p[1] - p[2] for p in points],
                "thickness": 1,
            }
        mode = "+".join(word for word, on in (("lines", series.lines), ("markers", series.markers)) if on)
        line = {"color": series.colour, "width": series.width, "shape": "hv" if series.step else "linear"}
        line |= {"dash": "dash"} if series.dashed else {}
        marker = {"size": series.size, "symbol": series.symbol, "color": series.colour}
        return trace | {"type": "scatter", "mode": mode, "line": line, "marker": marker}


def drawable(value: Any, log: bool = False) -> bool:
    """Whether a number has a place on an axis."""
    return value is not None and math.isfinite(value) and not (log and value <= 0)


def escape(text: str) -> str:
    """Text as plotly shows it: its labels understand some HTML, which no name may use."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
