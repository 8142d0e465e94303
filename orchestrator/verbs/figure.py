"""``solvus figure STUDY --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.naming import studies
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Where to, and as what."""
    parser.add_argument("--out", metavar="DIR", required=True, help="a folder; what is there is replaced")
    parser.add_argument("--format", default="pdf,svg", metavar="KINDS", help="of pdf, svg, png (default pdf,svg)")


def call(args: Any) -> int:
    """``solvus figure STUDY --out DIR``."""
    from dashboards.report import build, paper
    from dashboards.report.study import open_view

    ((root, name),) = studies(args, 1, "solvus figure STUDY --out DIR")
    kinds = formats(args.format)
    view = open_view(root, name)
    if not view.complete:
        raise ValueError(f"study {name} has no complete trial to draw. Run it: solvus run study={name}")
    sections = build.sections(view, pictures=False)
    charts = [chart for section in sections for chart in section.charts]
    tables = [table for section in sections for table in section.tables]
    files = [str(path) for path in paper.save(charts, tables, Path(args.out), kinds)]
    emit(args, {"files": files, "notices": view.notices}, "\n".join([*(f"note: {n}" for n in view.notices), *files]))
    return COMPLETE


def formats(text: str) -> list[str]:
    """The file formats of ``--format``."""
    from dashboards.report.paper import FORMATS

    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    if not kinds or set(kinds) - set(FORMATS):
        raise ValueError(f"--format must name some of {', '.join(FORMATS)}, got {text!r}. For example: pdf,svg.")
    return kinds


VERB = Verb(
    "a finished study's figures and tables as files for a paper",
    call,
    options,
    takes_settings=True,
    usage="solvus figure [-h] [--json] [--format KINDS] STUDY --out DIR [KEY=VALUE ...]",
)
