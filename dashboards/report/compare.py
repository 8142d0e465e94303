"""Two studies side by side: the best of each at every cost, and what both of them tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dashboards.report.chart import COLOURS, Chart, Series
from dashboards.report.figures import slug
from dashboards.report.study import Section, StudyView
from dashboards.report.table import Measured, Table
from dashboards.report.view import Row, compared, unequal
from dashboards.report.won import Difference, Judge, holm, measured, metric_of
from tasks.intervals import Z95

Pair = tuple[list[Any], Row, Row]


def compare(a: StudyView, b: StudyView) -> list[Section]:
    """One section for each quality that both measured; paired on the samples that two trials share.

    Raises:
        ValueError: one has no complete trial, or they have no value in common.
    """
    for view in (a, b):
        if not view.complete:
            raise ValueError(
                f"study {view.name} has no complete trial to compare. Run it: solvus run study={view.name}"
            )
    names = [name for name in a.qualities if name in b.qualities]
    names += [n for n in a.names if n.startswith("reward/") and n in b.names and n in a.better and n in b.better]
    if not names:
        raise ValueError(
            f"studies {a.name} and {b.name} have no quality or reward in common: {', '.join(a.names) or 'nothing'} "
            f"against {', '.join(b.names) or 'nothing'}. Run one again with the other's metrics."
        )
    return [_section(name, a, b) for name in names]


def _section(name: str, a: StudyView, b: StudyView) -> Section:
    judges = Judge(name, a), Judge(name, b)
    pools = [[row for row in compared(view.table) if row.value(name) is not None] for view in (a, b)]
    best = [_best(pool, judge) for pool, judge in zip(pools, judges, strict=True)]
    at_cost: list[Pair] = [([nfe], best[0][nfe], best[1][nfe]) for nfe in sorted(best[0]) if nfe in best[1]]
    known = {_setting(row): row for row in pools[1]}
    same: list[Pair] = [
        ([row.label.split(": ", 1)[1]], row, known[_setting(row)]) for row in pools[0] if _setting(row) in known
    ]
    notes = [f"{view.name}: {line}" for view in (a, b) for line in view.notices]
    if metric_of(name, a.config) != metric_of(name, b.config):
        notes.append(f"{name} was measured with different settings in the two studies.")
    models = [view.config.get("model") for view in (a, b)]
    if models[0] != models[1]:
        notes.append("The studies sample different models, so equal indices are not equal samples.")
    if not at_cost and not same:
        notes.append("They have no number of evaluations and no setting in common.")
    tables = [
        _table(f"{slug(name)}_best", f"The best at every cost, {name}", "NFE", at_cost, a, b, judges),
        _table(f"{slug(name)}_same", f"The same settings in both, {name}", "settings", same, a, b, judges),
    ]
    text = (
        f"{name}, {a.better[name]} is better. The difference is {a.name} minus {b.name} with its 95 % interval, on the "
        "samples that two trials share where they share any; p by Holm's method for the rows of a table."
    )
    chart = _chart(name, a, b, best)
    return Section(name, text, notes, [table for table in tables if table], [chart])


def _best(pool: list[Row], judge: Judge) -> dict[int, Row]:
    found: dict[int, Row] = {}
    for row in reversed(judge.ranked(pool)):
        found[row.nfe] = row
    return found


def _setting(row: Row) -> tuple[Any, ...]:
    return row.solver, row.grid, row.strategy, row.data["nfe"], tuple(row.times)


def _table(
    name: str, title: str, first: str, pairs: list[Pair], a: StudyView, b: StudyView, judges: tuple[Judge, Judge]
) -> Table:
    apart: list[Difference] = [judges[0].difference(x, y, judges[1]) for _, x, y in pairs]
    corrected = holm([difference.p for difference in apart])
    said: Callable[[Row], str] = lambda row: f"{row.solver}, {row.grid}"  # noqa: E731
    rows = []
    for (head, x, y), difference, p in zip(pairs, apart, corrected, strict=True):
        gap = Measured(difference.value, Z95 * difference.error, signed=True)
        cells = [measured(x, judges[0].name), measured(y, judges[0].name), gap, difference.shared, p]
        rows.append([*head, said(x), said(y), *cells, unequal(x, y)])
    head = [
        first,
        a.name,
        b.name,
        f"value of {a.name}",
        f"value of {b.name}",
        "difference",
        "shared samples",
        "p",
        "note",
    ]
    return Table(name, title, head, rows)


def _chart(name: str, a: StudyView, b: StudyView, best: list[dict[int, Row]]) -> Chart:
    series = []
    for view, found, colour, symbol in zip((a, b), best, COLOURS, ("circle", "square"), strict=False):
        points = [found[nfe] for nfe in sorted(found)]
        values, halves = [r.measured(name) for r in points], [Z95 * r.error(name) for r in points]
        low, high = ([v + s * h for v, h in zip(values, halves, strict=True)] for s in (-1, 1))
        text = [row.label for row in points]
        label = view.name if a.name != b.name else view.folder
        series.append(Series(label, [r.nfe for r in points], values, low, high, text, colour=colour, symbol=symbol))
    ticks = sorted({nfe for found in best for nfe in found})
    title = f"{name}: the best of each study"
    return Chart(f"{slug(name)}_compared", title, "network evaluations per sample", name, series, True, ticks_x=ticks)
