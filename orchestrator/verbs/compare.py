"""``solvus compare A B``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.figure import formats
from orchestrator.verbs.naming import studies
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Where to, and as what."""
    parser.add_argument("--out", metavar="DIR", help="also write the tables and figures here")
    parser.add_argument("--format", default="pdf,svg", metavar="KINDS", help="of pdf, svg, png (default pdf,svg)")


def call(args: Any) -> int:
    """``solvus compare A B``."""
    from dashboards.report import compare as comparing
    from dashboards.report import paper
    from dashboards.report.study import open_view

    a, b = studies(args, 2, "solvus compare A B [--out DIR]")
    kinds = formats(args.format)
    sections = comparing.compare(open_view(*a), open_view(*b))
    lines, data = [], []
    for section in sections:
        lines += ["", section.text, *(f"  {line}" for line in section.lines)]
        for table in section.tables:
            lines += ["", table.title, table.text()]
        tables = [{"title": t.title, "head": t.head, "rows": t.shown()} for t in section.tables]
        data.append({"value": section.title, "notes": list(section.lines), "tables": tables})
    files: list[str] = []
    if args.out is not None:
        charts, tables_ = [c for s in sections for c in s.charts], [t for s in sections for t in s.tables]
        files = [str(path) for path in paper.save(charts, tables_, Path(args.out), kinds)]
    emit(args, {"compared": data, "files": files}, "\n".join([*lines, *files]).strip())
    return COMPLETE


VERB = Verb(
    "two finished studies, paired where they share samples",
    call,
    options,
    takes_settings=True,
    usage="solvus compare [-h] [--json] [--format KINDS] [--out DIR] A B [KEY=VALUE ...]",
)
