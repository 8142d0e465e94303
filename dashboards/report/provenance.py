"""Which code, which machines and which command made a study."""

from __future__ import annotations

import json
import shlex
from typing import Any

from dashboards.report.study import GONE, Section, StudyView
from dashboards.report.table import Table


def section(view: StudyView) -> list[Section]:
    """Commits, versions, machines, the command, and the study as it was run."""
    commits = sorted({row.data["commit"] for row in view.table if row.data["commit"]})
    lines = [("This study mixes commits: " if len(commits) > 1 else "Commit: ") + (", ".join(commits) or "unknown")]
    command = (view.state.get("summary") or {}).get("command")
    if command:
        lines.append(f"Last launched by: {command}")
    lines.append(f"Again, exactly: solvus run --frozen {shlex.quote(f'{view.folder}/study.json')}")
    table = _origins(view)
    config = json.dumps(view.config, indent=1)
    return [
        Section(
            "Provenance", lines=lines, tables=[table] if table else [], details=[("The study as it was run", config)]
        )
    ]


def _origins(view: StudyView) -> Table:
    """Distinct makers of the rows: every trial is looked up by its first committed range."""
    counts: dict[str, int] = {}
    for key in dict.fromkeys(row.data["key"] for row in view.table if row.data["key"]):
        try:
            record = view.store.first_record("rows", key)
        except GONE:
            continue
        if record is not None:
            said = json.dumps(record.origin, sort_keys=True)
            counts[said] = counts.get(said, 0) + 1
    rows: list[list[Any]] = []
    for said, count in counts.items():
        origin = json.loads(said)
        versions = ", ".join(f"{name} {version}" for name, version in origin.get("versions", {}).items())
        rows.append([origin.get("commit") or "unknown", origin.get("machine", "unknown"), versions, count])
    return Table("provenance", "Who made the rows", ["commit", "machine", "versions", "recipes"], rows)
