"""What a study cost, and which trials no other one beats in quality and cost at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dashboards.report import figures
from dashboards.report.study import Section, StudyView
from dashboards.report.table import Table
from dashboards.report.view import Row, compared
from dashboards.report.won import measured

DISTANCE = "quality/acceleration_distance"


def section(view: StudyView) -> list[Section]:
    """Totals of the study, and of each of its parts."""
    if not view.table:
        return []
    return [Section("What it cost", tables=[t for t in (_totals(view), _by_part(view), _savings(view)) if t])]


def _totals(view: StudyView) -> Table:
    table, summary = view.table, view.state.get("summary") or {}
    distinct = list(_distinct(table).values())
    seconds = _sum(distinct, "generate_s") + _sum(distinct, "score_s")
    rows: list[list[Any]] = [
        ["trials", f"{len(table):,} ({len(distinct):,} different)"],
        ["network evaluations", _sum(distinct, "nfe")],
        ["reward calls inside strategies", _sum(distinct, "reward_calls")],
        ["of these answered from memory", _sum(distinct, "reward_reused")],
        ["seconds of scoring inside strategies", _sum(distinct, "reward_s")],
        ["device-seconds of generation", _sum(distinct, "generate_s")],
        ["device-seconds of scoring", _sum(distinct, "score_s")],
    ]
    if summary.get("wall_s") is not None:
        rows.append(["wall time of the last launch, s", float(summary["wall_s"])])
        rows.append(["samples made by the last launch", summary.get("samples_made", 0)])
        rows.append(["samples reused by the last launch", summary.get("samples_reused", 0)])
    if view.config.get("price_per_device_hour"):
        rows.append(["money", seconds / 3600 * view.config["price_per_device_hour"]])
    rows = [[label, f"{value:,.1f}" if isinstance(value, float) else value] for label, value in rows]
    return Table("cost", "Cost of the study", ["what", "how much"], rows)


def _by_part(view: StudyView) -> Table | None:
    names = list(dict.fromkeys(row.data["part"] or "trials" for row in view.table))
    if len(names) < 2:
        return None
    rows = []
    for name in names:
        inside = list(_distinct([row for row in view.table if (row.data["part"] or "trials") == name]).values())
        samples = sum(row.data["num_samples"] for row in inside)
        rows.append(
            [name, len(inside), samples, int(_sum(inside, "nfe")), _sum(inside, "generate_s") + _sum(inside, "score_s")]
        )
    head = ["part", "different trials", "samples", "network evaluations", "device-seconds"]
    return Table("cost_by_part", "Cost of its parts; what two of them share counts in both", head, rows)


def _savings(view: StudyView) -> Table | None:
    """What savings saved and what they changed, for trials whose rows were made without them too."""
    rows = [row for row in view.complete if row.data.get("cost/speedup") is not None]
    if not rows:
        return None
    head = ["trial", "guidance", "evaluations", "work", "speed-up", DISTANCE]
    body = [
        [row.name, row.recipe["guidance"]["name"], row.nfe, row.value("cost/work"), row.data["cost/speedup"],
         measured(row, DISTANCE)]
        for row in rows
    ]  # fmt: skip
    title = "Savings, against the same rows without them; the speed-up is of device-seconds, as both were measured"
    return Table("savings", title, head, body)


def _distinct(table: list[Row]) -> dict[tuple[str, int, int], Row]:
    return {(row.data["key"], *row.span): row for row in table}


def _sum(rows: list[Row], name: str) -> float:
    return float(sum(row.data.get(f"cost/{name}") or 0.0 for row in rows))


# --- quality against cost --------------------------------------------------------------------------------------------


def fronts(view: StudyView) -> list[Section]:
    """For every quality: the Pareto front of all trials, each solver's curve, and the front as a table."""
    found = []
    whole = [row for row in view.complete if not row.stopped]
    for name in view.qualities:
        known = [row for row in whole if row.value(name) is not None]
        held = _equal_counts([row for row in known if row.held_out])
        own = _equal_counts([row for row in known if not row.held_out])
        same = held if len({row.data["nfe"] for row in held}) > 1 else own
        if len({row.data["nfe"] for row in same}) < 2:
            continue
        front = pareto(same, name, view.is_lower(name))
        charts = [figures.pareto(same, front, name)]
        single = compared(same)
        if len({row.nfe for row in single}) > 1:
            charts.append(figures.quality_against_nfe(single, name, view.is_lower(name)))
        kind = "held-out samples" if same is held else "samples that a search chose by" if held else "samples"
        text = (
            f"{name}, {view.better[name]} is better, on {same[0].span[1]:,} {kind} a trial: values at other numbers "
            "of samples are left out of the front, because they do not compare. Each solver is drawn with its best "
            "grid. Intervals are 95 %."
        )
        found.append(Section(f"Quality against cost: {name}", text, tables=[_front_table(front, name)], charts=charts))
    return found


def _equal_counts(rows: list[Row]) -> list[Row]:
    """Those trials with the commonest number of samples."""
    counts = Counter(row.span[1] for row in rows)
    return [row for row in rows if row.span[1] == counts.most_common(1)[0][0]] if rows else []


def pareto(rows: list[Row], name: str, lower: bool) -> list[Row]:
    """The trials that no other one beats in value and evaluations at once, cheapest first."""
    sign = 1 if lower else -1
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.data["nfe"], sign * r.measured(name))):
        if not front or sign * row.measured(name) < sign * front[-1].measured(name):
            front.append(row)
    return front


def _front_table(front: list[Row], name: str) -> Table:
    head = ["NFE", "trial", "solver", "grid", "strategy", name, "device-seconds a sample"]
    rows = [
        [row.data["nfe"], row.name, row.solver, row.grid, row.strategy, measured(row, name), row.data.get("seconds")]
        for row in front
    ]
    return Table(f"{figures.slug(name)}_front", f"The Pareto front of {name}", head, rows)
