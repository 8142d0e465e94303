"""Every trial as one table; what failed; which rows were set aside, and why."""

from __future__ import annotations

from typing import Any

from dashboards.report import figures
from dashboards.report.study import Section, StudyView
from dashboards.report.table import Table
from dashboards.report.view import parts
from dashboards.report.won import measured


def candidates(view: StudyView) -> list[Section]:
    """Rewards and qualities against the number of candidates, for parts where that differs."""
    found = []
    for part, members in parts(view.table).items():
        if len({row.particles for row in members}) > 1:
            shown = [n for n in view.names if not n.startswith("cost/")]
            text = (
                "One candidate is plain sampling; N candidates cost N times as much. The reward that selects always "
                "rises: look at the others too."
            )
            found.append(Section(f"Best of N: {part}", text, charts=figures.best_of_n(part, members, shown)))
    return found


def section(view: StudyView) -> list[Section]:
    """All trials."""
    if not view.table:
        return []
    head = ["#", "part", "solver", "grid", "strategy", "gives", "NFE", "samples", *view.names, "state"]
    rows = []
    for row in view.table:
        data = row.data
        cells: list[Any] = [data["number"], data["part"], row.solver, row.grid, row.strategy]
        cells += [row.gives, data["nfe"]]
        cells.append(data["num_samples"])
        rows.append([*cells, *(measured(row, name) for name in view.names), data["state"]])
    return [Section("Trials", tables=[Table("trials", "All trials", head, rows)])]


def troubles(view: StudyView) -> list[Section]:
    """Failed trials and quarantined rows with their reasons."""
    found = []
    failed = [[row.data["title"], row.data["reason"]] for row in view.table if row.data["state"] == "failed"]
    if failed:
        found.append(Section("Failed trials", tables=[Table("failed", "Failed trials", ["trial", "reason"], failed)]))
    aside = [
        [row.data["number"], row.data["key"], int(index), why]
        for row in view.table
        for index, why in row.quarantined.items()
    ]
    if aside:
        text = "These rows count in no value. solvus gc --release takes them out of quarantine, to be tried again."
        head = ["trial", "recipe", "index", "reason"]
        table = Table("quarantined", "Quarantined rows", head, aside)
        found.append(Section("Quarantined rows", text, tables=[table]))
    return found
