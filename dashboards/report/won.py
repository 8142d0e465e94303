"""What won and by how much: winners at every cost, paired tests, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dashboards.report.study import GONE, Section, StudyView
from dashboards.report.table import Measured, Table
from dashboards.report.view import Row, compared, costs, parts, unequal
from orchestrator import measure
from tasks import registry
from tasks.intervals import Z95, holm, two_sided


def section(view: StudyView, answers: Sequence[str] = (), tables: Sequence[Table] = ()) -> list[Section]:
    """The answers of the searches, then the winner at every cost; empty without a complete trial and a quality."""
    if not view.qualities or not view.complete:
        return [Section("What won", lines=answers, tables=tables)] if answers else []
    name = view.qualities[0]
    judge = Judge(name, view)
    pool = [row for row in compared(view.table) if row.value(name) is not None]
    places = _places(pool, judge)
    lines = [*answers, *(_sentence(place, judge) for place in places), *_candidates(view)]
    text = (
        f"Judged by {name} ({view.better[name]} is better). Intervals are 95 %, from the infinitesimal jackknife over "
        "samples; p is of the two-sided test of the difference, by Holm's method for all rows of the table together."
    )
    return [Section("What won", text, lines, [t for t in [*tables, _table(places, judge)] if t])]


@dataclass(frozen=True)
class Difference:
    """Value of a minus value of b, its standard error, and on how many shared samples (0: as if independent)."""

    value: float
    error: float
    shared: int

    @property
    def p(self) -> float:
        """Two-sided p-value of "no difference", by the normal law."""
        return two_sided(self.value, self.error)

    def __str__(self) -> str:
        return f"{self.value:+.3g} ± {Z95 * self.error:.2g} ({'paired' if self.shared else 'unpaired'})"


def interval(row: Row, name: str) -> str:
    """A value with its 95 % interval."""
    return f"{row.measured(name):.3f} ± {Z95 * row.error(name):.2g}"


def measured(row: Row, name: str) -> Measured:
    """The same as a cell of a table."""
    return Measured(row.value(name), Z95 * row.error(name) or None)


class Judge:
    """Orders trials by one quality and compares two of them row by row."""

    def __init__(self, name: str, view: StudyView) -> None:
        self.name, self.lower, self._view = name, view.is_lower(name), view
        self._metric = metric_of(name, view.config)
        self._known: dict[tuple[str, int, int], measure.Influences] = {}

    def ranked(self, rows: list[Row]) -> list[Row]:
        """Best first."""
        return sorted(rows, key=lambda row: row.measured(self.name), reverse=not self.lower)

    def difference(self, a: Row, b: Row, other: Judge | None = None) -> Difference:
        """a minus b: paired on the samples that both have, where these are still there; else as if independent.

        Args:
            other: the judge of b where it is a trial of another study.
        """
        first, stop = max(a.span[0], b.span[0]), min(sum(a.span), sum(b.span))
        if stop - first > 1 and a.recipe.get("seed") == b.recipe.get("seed"):
            try:
                pair = self._effects(a, first, stop), (other or self)._effects(b, first, stop)
                value, error = measure.paired_difference(*pair)
                if math.isfinite(error):
                    return Difference(value, error, stop - first)
            except GONE:
                pass
        error = math.hypot(a.error(self.name), b.error(self.name))
        return Difference(a.measured(self.name) - b.measured(self.name), error, 0)

    def on_first(self, row: Row, count: int) -> float | None:
        """A trial's value on the first ``count`` of its samples alone; None where it has fewer or they are gone."""
        if count > row.span[1]:
            return None
        try:
            return self._effects(row, row.span[0], row.span[0] + count).value
        except GONE:
            return None

    def effects(self, row: Row) -> measure.Influences:
        """A trial's value and every sample's first-order effect on it.

        Raises:
            KeyError, CorruptShard, ValueError, TypeError: rows that are gone or damaged.
        """
        return self._effects(row, row.span[0], sum(row.span))

    def _effects(self, row: Row, first: int, stop: int) -> measure.Influences:
        key = (row.data["key"], first, stop)
        if key not in self._known:
            recipe, store = self._view.recipe(row), self._view.store
            cluster = self._view.config.get("group_by")
            self._known[key] = measure.influences(recipe, self._metric, self.name, first, stop, store, cluster)
        return self._known[key]


def metric_of(name: str, config: dict[str, Any]) -> registry.Spec:
    """The spec of the metric that gives a value."""
    return next(spec for spec in measure.completed(config["metrics"]) if name in registry.metrics.build(spec).better)


@dataclass(frozen=True)
class _Place:
    """The winner at one cost, the next, and how far apart they are."""

    nfe: float
    winner: Row
    second: Row | None
    apart: Difference | None


def _places(pool: list[Row], judge: Judge) -> list[_Place]:
    found = []
    for nfe in sorted({row.nfe for row in pool}):
        first, *others = judge.ranked([row for row in pool if row.nfe == nfe])
        rivals = [row for row in others if row.span == first.span and row.data["key"] != first.data["key"]]
        second = rivals[0] if rivals else None
        found.append(_Place(nfe, first, second, judge.difference(first, second) if second else None))
    return found


def _sentence(place: _Place, judge: Judge) -> str:
    first, second = place.winner, place.second
    line = f"At {place.nfe} evaluations: {first.solver} with the {first.grid} grid, {interval(first, judge.name)}"
    if second is not None:
        line += f"; against {second.solver} with {second.grid}, the next, {place.apart}"
        warning = unequal(first, second)
        line += f" at equal cost of {costs(first)} a sample" if not warning else f". {warning}"
    return line + "."


def _table(places: list[_Place], judge: Judge) -> Table:
    tests = [place.apart for place in places if place.apart is not None]
    corrected = iter(holm([test.p for test in tests]))
    rows = []
    for place in places:
        first, second, apart = place.winner, place.second, place.apart
        row: list[Any] = [place.nfe, f"{first.solver}, {first.grid}", measured(first, judge.name), first.span[1]]
        row.append("held out" if first.held_out else "the choice's own")
        if second is None or apart is None:
            row += [None] * 4
        else:
            gap = Measured(apart.value, Z95 * apart.error, signed=True)
            row += [f"{second.solver}, {second.grid}", gap, "yes" if apart.shared else "no", next(corrected)]
        rows.append(row)
    head = ["NFE", "winner", judge.name, "samples", "measured on", "the next", "difference", "paired", "p (Holm)"]
    return Table("winners", "The winner at every cost, and the next", head, rows)


def _candidates(view: StudyView) -> list[str]:
    lines = []
    for members in parts(view.table).values():
        ordered = sorted(members, key=lambda row: row.particles)
        rewards = [n for n in view.names if n.startswith("reward/") and ordered[0].value(n) is not None]
        if len({row.particles for row in ordered}) > 1 and rewards:
            shown = [row for row in ordered if row.value(rewards[0]) is not None]
            curve = ", ".join(f"N={row.particles} {interval(row, rewards[0])}" for row in shown)
            lines.append(f"Best of N, {rewards[0]}: {curve}.")
    return lines
