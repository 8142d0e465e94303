"""A chart as an SVG drawing, in the page's own colours: what is seen without JavaScript, in print, and saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from dashboards.report.chart import Chart, Series, drawable

WIDTH, PLOT = 720, 330
LEFT, RIGHT, TOP = 74, 16, 34
LETTER = 6.6  # width of one at 12 px, about; only to lay out the legend
Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """One ``<svg>`` element; ink is the text colour of where it stands."""
    body, bottom = _bars(chart) if chart.bars else _scatter(chart)
    legend, height = ("", bottom) if chart.bars else _legend(chart, bottom)
    title = _text(WIDTH / 2, 18, chart.title, "middle", size=14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{_clean(chart.title)}" font-family="system-ui, sans-serif" fill="currentColor">'
        f"{title}{body}{legend}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turned}>{_clean(text)}</text>'


def _clean(text: str) -> str:
    """Escaped, and without the characters that XML has no way to say."""
    return escape("".join(letter for letter in text if letter >= " " and letter not in "\ufffe\uffff"))


def _rule(x1: float, y1: float, x2: float, y2: float, opacity: float = 0.15) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-opacity="{opacity}"/>'


# --- axes ------------------------------------------------------------------------------------------------------------


def scale(values: list[float], log: bool, start: float, end: float) -> tuple[Scale, float, float]:
    """A map from the values' range, a little widened, to [start, end]; and that range."""
    values = values or [1.0]
    put = math.log10 if log else float
    low, high = min(map(put, values)), max(map(put, values))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    back = (lambda v: 10**v) if log else float
    return lambda v: start + (put(v) - low) / (high - low) * (end - start), back(low), back(high)


def ticks(low: float, high: float, log: bool, wanted: int = 6) -> list[float]:
    """Round numbers inside a range."""
    if log and high / low > 4:
        powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        inside = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
        return inside if len(inside) <= 10 else [power for power in powers if low <= power <= high]
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _scatter(chart: Chart) -> tuple[str, float]:
    points = [p for series in chart.series for p in chart.points(series)]
    xs = [float(p[0]) for p in points]
    ys = [float(v) for p in points for v in (p[1], p[2], p[3]) if v is not None]
    bottom = TOP + PLOT
    place_x, low_x, high_x = scale(xs, chart.log_x, LEFT, WIDTH - RIGHT)
    place_y, low_y, high_y = scale(ys, chart.log_y, bottom, TOP)
    out = []
    last = -math.inf
    for tick in sorted(chart.ticks_x) or ticks(low_x, high_x, chart.log_x):
        if drawable(tick, chart.log_x) and low_x <= tick <= high_x and place_x(tick) - last > 26:
            last = place_x(tick)
            out += [_rule(last, TOP, last, bottom), _text(last, bottom + 16, f"{tick:.4g}", "middle")]
    for tick in ticks(low_y, high_y, chart.log_y):
        at = place_y(tick)
        out += [_rule(LEFT, at, WIDTH - RIGHT, at), _text(LEFT - 6, at + 4, f"{tick:.4g}", "end")]
    out += [_rule(LEFT, bottom, WIDTH - RIGHT, bottom, 0.6), _rule(LEFT, TOP, LEFT, bottom, 0.6)]
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, chart.x, "middle"))
    out.append(_text(16, TOP + PLOT / 2, chart.y, "middle", turn=True))
    out += [_series(chart, series, place_x, place_y) for series in chart.series]
    return "".join(out), bottom + 48


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _series(chart: Chart, series: Series, place_x: Scale, place_y: Scale) -> str:
    points = chart.points(series)
    at = [(place_x(p[0]), place_y(p[1])) for p in points]
    out = [f'<g stroke="{series.colour}" fill="{series.colour}">']
    if series.lines and len(at) > 1:
        path = f"M{at[0][0]:.1f},{at[0][1]:.1f}"
        for x, y in at[1:]:
            path += f"H{x:.1f}V{y:.1f}" if series.step else f"L{x:.1f},{y:.1f}"
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        out.append(f'<path d="{path}" fill="none" stroke-width="{series.width}"{dash}/>')
    for (x, y), point in zip(at, points, strict=True):
        low, high = point[2], point[3]
        if low is not None or high is not None:
            ends = place_y(point[1] if low is None else low), place_y(point[1] if high is None else high)
            out.append(f'<path d="M{x:.1f},{ends[0]:.1f}V{ends[1]:.1f}"/>')
        if series.markers:
            said = f"{series.label}: {point[0]:.4g}, {point[1]:.4g}" + (f" ({point[4]})" if point[4] else "")
            out.append(f"{_marker(x, y, series)[:-2]}><title>{_clean(said)}</title></path>")
    return "".join(out) + "</g>"


def _marker(x: float, y: float, series: Series) -> str:
    """A filled shape, told apart without colour."""
    r = series.size / 2
    shapes = {
        "square": f"M{x - r:.1f},{y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "diamond": f"M{x - 1.3 * r:.1f},{y:.1f}l{1.3 * r},{1.3 * r}l{1.3 * r},{-1.3 * r}l{-1.3 * r},{-1.3 * r}z",
        "triangle-up": f"M{x - 1.1 * r:.1f},{y + r:.1f}h{2.2 * r}l{-1.1 * r},{-2 * r}z",
        "cross": f"M{x - r:.1f},{y:.1f}h{2 * r}M{x:.1f},{y - r:.1f}v{2 * r}",
        "x": f"M{x - r:.1f},{y - r:.1f}l{2 * r},{2 * r}m0,{-2 * r}l{-2 * r},{2 * r}",
    }
    circle = f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0z"
    return f'<path d="{shapes.get(series.symbol, circle)}"/>'


def _bars(chart: Chart) -> tuple[str, float]:
    (series,) = chart.series
    points = chart.points(series)[::-1]  # the first is drawn at the bottom, as plotly does
    left = min(max([LEFT, *(LETTER * len(str(p[1])) + 16 for p in points)]), WIDTH / 2)
    place, low, high = scale([0.0, *(float(p[0]) for p in points)], False, left, WIDTH - RIGHT)
    bottom = TOP + 24 * max(len(points), 1)
    out = []
    for tick in ticks(low, high, False):
        out += [_rule(place(tick), TOP, place(tick), bottom), _text(place(tick), bottom + 16, f"{tick:.4g}", "middle")]
    for i, point in enumerate(points):
        top = TOP + 24 * i + 4
        start, end = sorted((place(0.0), place(point[0])))
        out.append(f'<path d="M{start:.1f},{top}H{end:.1f}v16H{start:.1f}z" fill="{series.colour}"/>')
        out.append(_text(left - 8, top + 12, str(point[1]), "end"))
    out.append(_text((left + WIDTH - RIGHT) / 2, bottom + 36, chart.x, "middle"))
    return "".join(out), bottom + 48


def _legend(chart: Chart, top: float) -> tuple[str, float]:
    """Names below the drawing, as many to a line as fit."""
    if len(chart.series) < 2:
        return "", top
    x, y, out = float(LEFT), top + 8, []
    for series in chart.series:
        label = series.label if len(series.label) <= 90 else series.label[:89] + "…"
        width = 24 + LETTER * len(label) + 14
        if x + width > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 20
        key = _marker(x + 8, y, series) if series.markers else f'<path d="M{x:.1f},{y:.1f}h16" stroke-width="2"/>'
        out.append(f'<g stroke="{series.colour}" fill="{series.colour}">{key}</g>' + _text(x + 22, y + 4, label))
        x += width
    return "".join(out), y + 18
