"""``solvus status --follow``: a running study, looked at once a second until it ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from orchestrator.exits import COMPLETE, DEGRADED, FAILED, INTERRUPTED
from orchestrator.progress import duration
from orchestrator.results import Results
from tasks.intervals import Z95

EXITS = {"complete": COMPLETE, "degraded": DEGRADED, "failed": FAILED, "interrupted": INTERRUPTED}


def lines(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of a state, as (label, text); one label may have several lines.

    Args:
        state: ``Results.state()``; its summary holds ``live``, a snapshot of ``Progress``, while the study runs.
    """
    live = state["summary"].get("live")
    if live is None:
        return [("state", state["state"] + _ended(state["summary"]))]
    left = "" if live["left_s"] is None else f", about {duration(live['left_s'])} left"
    trials, shards, samples = live["trials"], live["shards"], live["samples"]
    found = [("state", f"{state['state']} for {duration(live['elapsed_s'])}{left}")]
    failed = f", {trials['failed']} failed" if trials["failed"] else ""
    of = max(trials["foreseen"], trials["begun"])
    found.append(("trials", f"{trials['finished']} of at most {of}{failed}"))
    stages = ", ".join(f"{count:,} {'waiting' if s == 'waiting' else 'in ' + s}" for s, count in live["stages"].items())
    found.append(("shards", f"{shards['done']:,} done, {stages}"))
    found.append(("samples", f"{samples['made']:,} made, {samples['reused']:,} reused"))
    devices = f"{live['devices']} device{'s' if live['devices'] != 1 else ''} busy {live['busy']:.0%}"
    found.append(("speed", f"{live['samples_per_s']:,.1f} samples/s, {live['nfe_per_s']:,.0f} NFE/s, {devices}"))
    for part, best in live["best"].items():
        error = f" ± {Z95 * best['se']:.2g}" if best["se"] is not None else ""
        text = f"{part}: {best['name']} {best['value']:.4g}{error} at {best['nfe']:g} NFE, {best['title']}"
        found.append(("best", text))
    found.append(("spent", _spending(live["spent"], live["budget"])))
    again = sum(live["retries"].values())
    if again or live["quarantined"]:
        why = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in live["retries"].items() if count)
        found.append(("trouble", f"{again} shards again{f' ({why})' if why else ''}, {live['quarantined']} rows aside"))
    for when, text in live["errors"]:
        found.append(("errors", f"{time.strftime('%H:%M:%S', time.localtime(when))} {text}"))
    return found


def _spending(spent: Mapping[str, float], budget: Mapping[str, float]) -> str:
    def of(name: str, words: str, show: Any) -> str:
        return f" of {words} {show(budget[name])}" if budget.get(name) else ""

    def count(value: float) -> str:
        return f"{value:,.0f}"

    parts = [f"{count(spent['nfe'])}{of('nfe', 'at most', count)} NFE"]
    if spent["reward_calls"] or budget.get("reward_calls"):
        parts.append(f"{count(spent['reward_calls'])}{of('reward_calls', 'at most', count)} reward calls")
    parts.append(f"device {duration(spent['device_s'])}{of('device_s', 'about', duration)}")
    if spent["money"]:
        parts.append(f"money {spent['money']:.2f}{of('money', 'about', '{:.2f}'.format)}")
    return "; ".join(parts)


def _ended(summary: Mapping[str, Any]) -> str:
    if "samples_made" not in summary:
        return ""
    wall = f" in {duration(summary['wall_s'])}" if "wall_s" in summary else ""
    return f": {summary.get('trials', 0)} trials, {summary['samples_made']:,} samples made{wall}"


def follow(results: Results, as_json: bool, interval_s: float = 1.0, stream: TextIO | None = None) -> int:
    """Show a study until it runs no more.

    On a terminal the view stays in place; elsewhere every change is one line, with ``as_json`` one JSON object.

    Returns:
        the exit status that the study itself has.
    """
    stream = stream or sys.stdout
    if as_json or not stream.isatty():
        return _plain(results, as_json, interval_s, stream)
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=stream), auto_refresh=False) as live:
        while True:
            state = results.state()
            live.update(_panel(results.name, state), refresh=True)
            if state["state"] != "running":
                return EXITS.get(state["state"], COMPLETE)
            time.sleep(interval_s)


def _panel(name: str, state: Mapping[str, Any]) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid, before = Table.grid(padding=(0, 2)), ""
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in lines(state):
        style = "red" if label in ("errors", "trouble") else "green" if label == "best" else ""
        grid.add_row("" if label == before else label, Text(text, style=style))  # Text: no markup from trial titles
        before = label
    return Panel(grid, title=Text(name), expand=False)


def _plain(results: Results, as_json: bool, interval_s: float, stream: TextIO) -> int:
    shown = ""
    while True:
        state = results.state()
        data = {"study": results.name} | state
        text = "; ".join(f"{label} {line}" for label, line in lines(state))
        if state.get("updated") != shown or state["state"] != "running":
            shown = state.get("updated", "")
            print(json.dumps(data) if as_json else f"{results.name}: {text}", file=stream, flush=True)
        if state["state"] != "running":
            return EXITS.get(state["state"], COMPLETE)
        time.sleep(interval_s)
