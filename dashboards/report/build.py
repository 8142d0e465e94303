"""Build a study's report: one HTML file that opens from disk without a network."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

from dashboards.report import figures, scaling, search
from dashboards.report.findings import findings
from dashboards.report.view import Z95, Row, best_by_nfe, compared, parts, value_names
from orchestrator import rows
from orchestrator.results import Results
from orchestrator.store import CorruptShard, Store
from tasks import registry

GRID_COLUMNS = 20
GRID_TRIALS = 12


def write(root: str, name: str) -> str:
    """Write ``studies/NAME/report.html`` and return its place."""
    results, store = Results(root, name), Store(root)
    page = render(results, store, name)
    results.files.write("report.html", page.encode())
    return f"{results.folder}/report.html"


def render(results: Results, store: Store, name: str) -> str:
    """The page; a study without results says so instead of breaking."""
    import jinja2

    table = [Row(data) for data in results.trials()]
    config, state = results.study(), results.state()
    better = _better(config)
    names = value_names(table, better)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    sections = []
    if any(row.complete for row in table):
        found = search.sections(table, results.search(), better, store, config)
        sections = [
            *found,
            *scaling.sections(table, names, store, config),
            *_sections(table, config, names, better, store),
        ]
    return environment.get_template("page.html").render(
        name=name,
        config=config,
        config_text=json.dumps(config, indent=1),
        state=state,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        sections=sections,
        plotly=_plotly() if sections else "",
        findings=findings(table, names, better, store, config),
        table=_trial_table(table, names),
        failed=[row.data for row in table if row.data["state"] == "failed"],
        costs=_costs(table, state, config),
        commits=sorted({row.data["commit"] for row in table if row.data["commit"]}),
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _better(config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for spec in [*(config.get("metrics") or []), "cost"]:
        found |= registry.metrics.build(spec).better
    return found


def _html(figure: Any) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})


def _sections(
    table: list[Row], config: dict[str, Any], names: list[str], better: dict[str, str], store: Store
) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = []
    side_by_side = compared(table)
    qualities = [n for n in names if n.startswith("quality/")]
    if len({row.nfe for row in side_by_side}) > 1:
        plots = [_html(figures.quality_against_nfe(side_by_side, n, better[n] == "lower")) for n in qualities]
        sections.append(
            {
                "title": "Quality against cost",
                "text": "Each solver with its best time grid, with 95 % intervals. Compare values at equal numbers of "
                "samples only.",
                "plots": plots,
            }
        )
    process = registry.models.build(config["model"]).noising
    if process.kind == "gaussian":
        drawn = _drawn_schedules(table, qualities, better)
        if drawn:
            text = (
                "Where each grid spends its steps. The last step goes to t=0, which lies at infinity and is not drawn."
            )
            sections.append({"title": "Schedules", "text": text, "plots": [_html(figures.schedules(drawn, process))]})
    for part, members in parts(table).items():
        if len({row.particles for row in members}) > 1:
            shown = [n for n in names if not n.startswith("cost/")]
            plots = [_html(figure) for figure in figures.best_of_n(members, shown)]
            text = (
                "One candidate is plain sampling; N candidates cost N times as much. The reward that selects always "
                "rises: look at the others too."
            )
            sections.append({"title": f"Best of N: {part}", "text": text, "plots": plots})
    pictures = _pictures(table, qualities, better, store)
    if pictures:
        text = f"The same {GRID_COLUMNS} sample indices in every row: equal starting noise, equal labels."
        sections.append({"title": "Samples at equal index", "text": text, "plots": [], "pictures": pictures})
    return sections


def _drawn_schedules(table: list[Row], qualities: list[str], better: dict[str, str]) -> list[Row]:
    """The searched grid's trials with every stock grid at the same number of steps; else the best grid per solver."""
    if not qualities:
        return []
    searched = [row for row in compared(table) if row.grid == "searched"]
    if searched:
        nfe = searched[0].nfe
        seen: dict[tuple[str, str], Row] = {}
        for row in table:
            if row.complete and row.nfe == nfe and row.particles == 1 and row.grid != "searched":
                seen.setdefault((row.grid, row.solver), row)
        unique: dict[tuple[float, ...], Row] = {}
        for row in [*searched, *seen.values()]:
            unique.setdefault(tuple(row.times), row)
        return list(unique.values())[:8]
    name = qualities[0]
    series = best_by_nfe(compared(table), name, better[name] == "lower")
    common = sorted({row.nfe for members in series.values() for row in members})
    if not common:
        return []
    pick = common[len(common) // 2]
    return [row for members in series.values() for row in members if row.nfe == pick]


def _pictures(table: list[Row], qualities: list[str], better: dict[str, str], store: Store) -> list[dict[str, Any]]:
    shown: list[Row] = []
    pool = compared(table)
    if qualities:
        series = best_by_nfe(pool, qualities[0], better[qualities[0]] == "lower")
        searched = [row for members in series.values() for row in members if row.grid == "searched"]
        wanted = {row.nfe for row in searched} or {min((row.nfe for row in pool), default=0)}
        wanted.add(max((row.nfe for row in pool), default=0))
        shown = [row for members in series.values() for row in members if row.nfe in wanted]
    shown += [row for members in parts(table).values() for row in members if row.particles > 1]
    pictures = []
    for row in shown[:GRID_TRIALS]:
        first = row.data["first_index"]
        try:
            found = list(store.read("rows", row.data["key"], first, first + min(GRID_COLUMNS, row.data["num_samples"])))
        except (KeyError, CorruptShard):
            continue
        if not found or "image" not in found[0].column_names:
            return []
        items = [item for part in found for item in part["image"].to_pylist()]
        labels = [label for part in found for label in rows.to_numpy(part["label"])]
        candidates = f", best of {row.particles}" if row.particles > 1 else ""
        pictures.append(
            {
                "title": f"{row.solver}, {row.grid}, {row.nfe} evaluations{candidates}",
                "images": [
                    {"uri": "data:image/png;base64," + base64.b64encode(item["bytes"]).decode(), "label": int(label)}
                    for item, label in zip(items, labels, strict=True)
                ],
            }
        )
    return pictures


def _trial_table(table: list[Row], names: list[str]) -> dict[str, Any]:
    head = ["#", "part", "strategy", "gives", "solver", "grid", "N", "NFE", "samples", *names, "state"]
    body = []
    for row in table:
        cells = [row.data["number"], row.data["part"], row.strategy, row.gives, row.solver, row.grid, row.particles]
        cells.append(row.data["nfe"])
        cells.append(row.data["num_samples"])
        for name in names:
            value = row.value(name)
            interval = f" ± {Z95 * row.error(name):.2g}" if value is not None and row.error(name) else ""
            cells.append("" if value is None else f"{value:.4g}{interval}")
        body.append([*cells, row.data["state"]])
    return {"head": head, "body": body}


def _rewards(rows: list[Row]) -> str:
    """Calls of rewards, and how they were answered."""
    calls, reused, seconds = (
        sum(row.data.get(f"cost/{name}") or 0.0 for row in rows)
        for name in ("reward_calls", "reward_reused", "reward_s")
    )
    return f"{calls:,.0f}" + (f" ({reused:,.0f} from memory, {seconds:,.1f} s of scoring)" if calls else "")


def _costs(table: list[Row], state: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    distinct: dict[tuple[str, int, int], Row] = {(row.data["key"], *row.span): row for row in table}
    summary = state.get("summary", {})
    seconds = sum(row.data.get("cost/generate_s") or 0.0 for row in distinct.values())
    lines = [
        ("trials", f"{len(table):,} ({len(distinct):,} different)"),
        ("network evaluations", f"{sum(row.data.get('cost/nfe') or 0 for row in distinct.values()):,.0f}"),
        ("reward calls inside strategies", _rewards(list(distinct.values()))),
        ("device-seconds of generation", f"{seconds:,.1f}"),
    ]
    if summary.get("wall_s") is not None:
        lines.append(("wall time of the last launch", f"{summary['wall_s']:,.1f} s"))
        made, reused = summary.get("samples_made", 0), summary.get("samples_reused", 0)
        lines.append(("made and reused by the last launch", f"{made:,} and {reused:,} samples"))
    if config.get("price_per_device_hour"):
        lines.append(("money", f"{seconds / 3600 * config['price_per_device_hour']:,.2f}"))
    return lines
