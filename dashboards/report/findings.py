"""What came out of a study, in sentences: winners, paired comparisons, what candidates bought."""

from __future__ import annotations

from typing import Any

from dashboards.report.view import Z95, Row, compared, costs, parts, unequal
from orchestrator import measure
from orchestrator.store import CorruptShard, Store
from tasks import registry
from tasks.recipe import Recipe


def findings(
    table: list[Row], names: list[str], better: dict[str, str], store: Store, config: dict[str, Any]
) -> list[str]:
    """One sentence each; none without a complete trial and a quality."""
    qualities = [n for n in names if n.startswith("quality/")]
    if not qualities or not any(row.complete for row in table):
        return []
    name, judge = qualities[0], Judge(qualities[0], better[qualities[0]] == "lower", store, config)
    pool = [row for row in compared(table) if row.value(name) is not None]
    return [*_winners(pool, judge), *_candidates(table, names)]


def interval(row: Row, name: str) -> str:
    """A value with its 95 % interval."""
    return f"{row.measured(name):.3f} ± {Z95 * row.error(name):.2g}"


class Judge:
    """Orders trials by one quality and compares two of them row by row."""

    def __init__(self, name: str, lower: bool, store: Store, config: dict[str, Any]) -> None:
        self.name, self.lower, self._store = name, lower, store
        specs = (registry.metrics.complete(spec) for spec in config["metrics"])
        self._metric = next(spec for spec in specs if name in registry.metrics.build(spec).better)

    def ranked(self, rows: list[Row]) -> list[Row]:
        """Best first."""
        return sorted(rows, key=lambda row: row.measured(self.name), reverse=not self.lower)

    def difference(self, a: Row, b: Row) -> str:
        """a minus b with its 95 % interval: paired where the rows are still there, else as if independent."""
        try:
            value, error = measure.paired_difference(*(self._effects(row, row.span[1]) for row in (a, b)))
        except (KeyError, CorruptShard):
            error = (a.error(self.name) ** 2 + b.error(self.name) ** 2) ** 0.5
            return f"{a.measured(self.name) - b.measured(self.name):+.3g} ± {Z95 * error:.2g} (unpaired)"
        return f"{value:+.3g} ± {Z95 * error:.2g} (paired)"

    def on_first(self, row: Row, count: int) -> float | None:
        """A trial's value on the first ``count`` of its samples alone; None where it has fewer or they are gone."""
        if count > row.span[1]:
            return None
        try:
            return self._effects(row, count)[0]
        except (KeyError, CorruptShard):
            return None

    def effects(self, row: Row) -> tuple[float, Any]:
        """A trial's value and every sample's first-order effect on it.

        Raises:
            KeyError, CorruptShard: rows that are gone or damaged.
        """
        return self._effects(row, row.span[1])

    def _effects(self, row: Row, count: int) -> tuple[float, Any]:
        spec = self._store.get_json("recipes", row.data["key"])
        if spec is None:
            raise KeyError(row.data["key"])
        first = row.span[0]
        return measure.influences(Recipe(**spec), self._metric, self.name, first, first + count, self._store)


def _winners(pool: list[Row], judge: Judge) -> list[str]:
    lines = []
    for nfe in sorted({row.nfe for row in pool}):
        first, *others = judge.ranked([row for row in pool if row.nfe == nfe])
        line = f"At {nfe} evaluations: {first.solver} with the {first.grid} grid, {interval(first, judge.name)}"
        rivals = [row for row in others if row.span == first.span and row.data["key"] != first.data["key"]]
        if rivals:
            second = rivals[0]
            line += f"; against {second.solver} with {second.grid}, the next, {judge.difference(first, second)}"
            warning = unequal(first, second)
            line += f" at equal cost of {costs(first)} a sample" if not warning else f". {warning}"
        lines.append(line + ".")
    return lines


def _candidates(table: list[Row], names: list[str]) -> list[str]:
    lines = []
    for members in parts(table).values():
        ordered = sorted(members, key=lambda row: row.particles)
        rewards = [n for n in names if n.startswith("reward/") and ordered[0].value(n) is not None]
        if len({row.particles for row in ordered}) > 1 and rewards:
            curve = ", ".join(f"N={row.particles} {interval(row, rewards[0])}" for row in ordered)
            lines.append(f"Best of N, {rewards[0]}: {curve}.")
    return lines
