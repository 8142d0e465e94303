"""Where time grids spend their steps, drawn over each other in log-SNR."""

from __future__ import annotations

from dashboards.report import figures
from dashboards.report.study import Section, StudyView
from dashboards.report.view import Row, best_by_nfe, compared
from tasks import registry


def section(view: StudyView) -> list[Section]:
    """Empty for processes without a signal-to-noise ratio, or where nothing was measured."""
    if not view.qualities or not view.complete:
        return []
    process = registry.models.build(view.config["model"]).noising
    drawn = _drawn(view) if process.kind == "gaussian" else []
    if not drawn:
        return []
    text = "Where each grid spends its steps. The last step goes to t=0, which lies at infinity and is not drawn."
    return [Section("Schedules", text, charts=[figures.schedules(drawn, process)])]


def _drawn(view: StudyView) -> list[Row]:
    """The searched grid's trials with every stock grid at the same number of steps; else the best grid per solver."""
    pool = compared(view.table)
    searched = [row for row in pool if row.grid == "searched"]
    if searched:
        nfe = searched[0].nfe
        seen: dict[tuple[str, str], Row] = {}
        for row in view.complete:
            if row.nfe == nfe and row.particles == 1 and row.grid != "searched":
                seen.setdefault((row.grid, row.solver), row)
        unique: dict[tuple[float, ...], Row] = {}
        for row in [*searched[:4], *seen.values()]:
            unique.setdefault(tuple(row.times), row)
        return list(unique.values())[:8]
    name = view.qualities[0]
    series = best_by_nfe(pool, name, view.is_lower(name))
    common = sorted({row.nfe for members in series.values() for row in members})
    if not common:
        return []
    pick = common[len(common) // 2]
    return [row for members in series.values() for row in members if row.nfe == pick][:8]
