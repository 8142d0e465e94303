"""What every search of a study found: its winner beside the best baseline, the optimism of its choice, what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dashboards.report import figures
from dashboards.report.study import Section, StudyView
from dashboards.report.table import Measured, Table
from dashboards.report.view import Row
from dashboards.report.won import Difference, Judge, holm, interval, measured
from tasks.intervals import Z95
from tasks.schedule import SolverSchedule


def answers(view: StudyView) -> tuple[list[str], list[Table]]:
    """What the searches came to: in sentences, and those with one objective as a table too."""
    lines, verdicts = [], []
    found = list(_finished(view))
    for entry, rows, held, objectives in found:
        several = f"{_title(entry)}: " if len(found) > 1 else ""
        if len(objectives) > 1:
            said = _front(held or _undominated(rows, objectives, view), objectives)
        elif (verdict := _judge(_title(entry), rows, held, Judge(objectives[0], view))) is not None:
            verdicts.append(verdict)
            said = _sentences(verdict)
        else:
            said = []
        lines += [several + line for line in said]
    return lines, [_table(verdicts)] if verdicts else []


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


@dataclass(frozen=True)
class _Verdict:
    """A search's winner beside the best baseline.

    Attributes:
        again, rival: the winner and the baseline on held-out samples, where they were measured there.
        equal: the winner's held-out value on as many samples as it was chosen on: at other numbers a metric's own bias
            would pass for optimism.
        apart: winner minus baseline, held out where both were; None where the baseline won, or none was tried.
    """

    title: str
    name: str
    winner: Row
    known: Row | None
    again: Row | None
    rival: Row | None
    equal: float | None
    apart: Difference | None

    @property
    def optimism(self) -> float | None:
        """How much the choice flattered itself: held-out minus chosen-on value."""
        return None if self.equal is None else self.equal - self.winner.measured(self.name)


def _judge(title: str, rows: list[Row], held: list[Row], judge: Judge) -> _Verdict | None:
    winner, known = best(rows, judge), best(rows, judge, baseline=True)
    if winner is None:
        return None
    again, rival = _same(held, winner), None if known is None else _same(held, known)
    equal = None if again is None else judge.on_first(again, winner.span[1])
    apart = None
    if known is not None and known is not winner:
        both = (again, rival) if again is not None and rival is not None else (winner, known)
        apart = judge.difference(*both)
    return _Verdict(title, judge.name, winner, known, again, rival, equal, apart)


def _sentences(v: _Verdict) -> list[str]:
    winner, name = v.winner, v.name
    lines = [f"The winner is {winner.name}: {interval(winner, name)} on the {_samples(winner)} it was chosen on."]
    if v.again is not None:
        lines.append(f"On held-out samples it has {interval(v.again, name)} ({_samples(v.again)}).")
        if v.again.span[1] < winner.span[1]:
            lines.append(
                f"It was measured on fewer than the {_samples(winner)} that it was chosen on, so the optimism of the "
                "choice is not known: set search.held_out to as many or more."
            )
        elif v.optimism is None:
            lines.append("Its held-out rows cannot be read, so the optimism of the choice is not known.")
        else:
            lines.append(
                f"The optimism of the choice is {v.optimism:+.3g}: {v.equal:.3f} on the first {_samples(winner)} of "
                f"the held-out ones, against {winner.measured(name):.3f} on those it was chosen on."
            )
    if v.known is None:
        lines.append("No baseline was tried: set search.baselines=stock.")
    elif v.apart is None:
        lines.append("No proposal beat the best baseline.")
    elif v.again is not None and v.rival is not None:
        lines.append(f"Against the best baseline ({v.known.baseline}; held out {interval(v.rival, name)}): {v.apart}.")
    else:
        lines.append(f"Against the best baseline ({v.known.baseline}): {v.apart}, on its own samples.")
    return lines


def _table(verdicts: list[_Verdict]) -> Table:
    corrected = iter(holm([v.apart.p for v in verdicts if v.apart is not None]))
    rows = []
    for v in verdicts:
        gap = None if v.apart is None else Measured(v.apart.value, Z95 * v.apart.error, signed=True)
        cells: list[Any] = [v.title, v.name, v.winner.name, measured(v.winner, v.name), v.winner.span[1]]
        cells += [None, None] if v.again is None else [measured(v.again, v.name), v.again.span[1]]
        cells += [None if v.optimism is None else Measured(v.optimism, signed=True)]
        cells += [v.known.baseline if v.known else None, gap, None if v.apart is None else next(corrected)]
        rows.append(cells)
    head = ["search", "value", "winner", "chosen on", "samples", "held out", "held-out samples", "optimism",
            "best baseline", "winner minus it", "p (Holm)"]  # fmt: skip
    return Table("searches", "Winners of the searches", head, rows)


def _undominated(rows: list[Row], objectives: list[str], view: StudyView) -> list[Row]:
    """The trials that no other one that went all the way is as good as in all objectives and better in one."""
    full = [row for row in rows if not row.stopped]
    points = [[row.measured(n) * (1 if view.is_lower(n) else -1) for n in objectives] for row in full]

    def is_beaten(p: list[float]) -> bool:
        return any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)

    return [row for row, p in zip(full, points, strict=True) if not is_beaten(p)]


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
