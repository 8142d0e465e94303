"""What every search of a study found: its winner beside the best baseline, the optimism of its choice, what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dashboards.report import figures
from dashboards.report.study import Section, StudyView
from dashboards.report.view import Row
from dashboards.report.won import Judge, interval
from tasks.schedule import SolverSchedule


def answers(view: StudyView) -> list[str]:
    """What the searches came to, in sentences."""
    lines = []
    found = list(_finished(view))
    for entry, rows, held, objectives in found:
        several = f"{_title(entry)}: " if len(found) > 1 else ""
        said = (
            _front(held or rows, objectives) if len(objectives) > 1 else _answer(rows, held, Judge(objectives[0], view))
        )
        lines += [several + line for line in said]
    return lines


def sections(view: StudyView) -> list[Section]:
    """One section a search that finished at least one trial."""
    return [_section(view, *found) for found in _finished(view)]


def _finished(view: StudyView) -> Iterator[tuple[dict[str, Any], list[Row], list[Row], list[str]]]:
    """(what a search says, its trials, the same held out, objectives) of those that have something to show."""
    for entry in view.searches:
        rows = [row for row in view.complete if row.data["part"] == entry["part"]]
        objectives = [name for name in entry["objectives"] if name in view.better]
        rows = [row for row in rows if all(row.value(name) is not None for name in objectives)]
        held = [row for row in view.complete if row.data["part"] == entry.get("held_out", "")]
        held = [row for row in held if all(row.value(name) is not None for name in objectives)]
        if rows and objectives:
            yield entry, rows, held, objectives


def _title(entry: dict[str, Any]) -> str:
    return entry["part"] or entry["search"]


def _section(
    view: StudyView, entry: dict[str, Any], rows: list[Row], held: list[Row], objectives: list[str]
) -> Section:
    name = objectives[0]
    charts = [figures.search_history(rows, name, view.is_lower(name))]
    if len(objectives) > 1:
        charts.append(figures.front(rows, held, objectives))
    if entry["importances"] and entry["importances"][0]:
        charts.append(figures.importances(entry["importances"][0], name, _title(entry)))
    return Section(
        f"Search: {_title(entry)}",
        f"{entry['search']}, visible in optuna-dashboard as {entry['optuna_study']}.",
        _cost(rows, entry),
        charts=charts,
        details=[] if len(objectives) > 1 else _winning_schedule(rows, Judge(name, view)),
    )


def best(rows: list[Row], judge: Judge, baseline: bool | None = None) -> Row | None:
    """The best trial that went all the way; of baselines or of proposals only if asked for."""
    full = [row for row in rows if not row.stopped and (baseline is None or bool(row.baseline) == baseline)]
    return judge.ranked(full)[0] if full else None


def _answer(rows: list[Row], held: list[Row], judge: Judge) -> list[str]:
    winner, known = best(rows, judge), best(rows, judge, baseline=True)
    if winner is None:
        return []
    lines = [f"The winner is {winner.name}: {interval(winner, judge.name)} on the {_samples(winner)} it was chosen on."]
    again = _same(held, winner)
    if again is not None:
        lines.append(f"On held-out samples it has {interval(again, judge.name)} ({_samples(again)}).")
        # At equal sample counts, or the metric's own bias would pass for optimism.
        equal = judge.on_first(again, winner.span[1])
        if equal is None:
            lines.append(
                f"It was measured on fewer than the {_samples(winner)} that it was chosen on, so the optimism of the "
                "choice is not known: set search.held_out to as many or more."
            )
        else:
            gap = equal - winner.measured(judge.name)
            lines.append(
                f"The optimism of the choice is {gap:+.3g}: {equal:.3f} on the first {_samples(winner)} of the "
                f"held-out ones, against {winner.measured(judge.name):.3f} on those it was chosen on."
            )
    if known is None:
        return [*lines, "No baseline was tried: set search.baselines=stock."]
    rival = _same(held, known)
    if known is winner:
        lines.append("No proposal beat the best baseline.")
    elif again is not None and rival is not None:
        lines.append(
            f"Against the best baseline ({known.baseline}; held out {interval(rival, judge.name)}): "
            f"{judge.difference(again, rival)}."
        )
    else:
        lines.append(
            f"Against the best baseline ({known.baseline}): {judge.difference(winner, known)}, on its own samples."
        )
    return lines


def _front(rows: list[Row], objectives: list[str]) -> list[str]:
    where = "held-out samples" if rows and rows[0].held_out else "the search's own samples"
    lines = [f"The Pareto front on {where}, {' and '.join(objectives)}:"]
    for row in sorted(rows, key=lambda r: r.measured(objectives[0])):
        lines.append(f"{row.name}: " + ", ".join(interval(row, name) for name in objectives))
    return lines


def _cost(rows: list[Row], entry: dict[str, Any]) -> list[str]:
    """Where the evaluations of a search went."""
    distinct = {row.data["key"]: row for row in sorted(rows, key=lambda row: row.span[1])}.values()
    spent = sum(row.data.get("cost/nfe") or 0.0 for row in distinct)
    known = sum(row.data.get("cost/nfe") or 0.0 for row in distinct if row.baseline)
    full = max(row.span[1] for row in rows)
    straight = sum((row.data.get("cost/nfe") or 0.0) * full / row.span[1] for row in distinct)
    line = f"{len(rows)} trials cost {spent:,.0f} network evaluations, {known:,.0f} of them for baselines"
    if entry.get("racing") and straight > spent:
        line += f"; racing saved {1 - spent / straight:.0%} of the {straight:,.0f} that all samples would have cost"
    reused = sum(row.data.get("cost/nfe_reused") or 0.0 for row in distinct)
    if reused:
        line += f"; {reused:,.0f} were not made because trials begin alike"
    return [line + "."]


def _winning_schedule(rows: list[Row], judge: Judge) -> list[tuple[str, str]]:
    winner = best(rows, judge)
    if winner is None:
        return []
    found = winner.schedule
    if found is None:
        return []
    aloud = SolverSchedule.from_data(found).read_aloud()
    return [
        ("The winning schedule, read aloud", aloud),
        ("The same as JSON: save it, and run it with schedule=FILE", json.dumps(found, indent=1)),
    ]


def _same(rows: list[Row], other: Row) -> Row | None:
    return next((row for row in rows if row.data["key"] == other.data["key"]), None)


def _samples(row: Row) -> str:
    return f"{row.span[1]:,} samples"
