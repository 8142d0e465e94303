"""The verbs that draw and compare finished studies: figure and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs_look import emit, root_and_name


def _named(args: Any, count: int, usage: str) -> list[tuple[str, str]]:
    """(root, name) of the studies that were given: a name below the root, or a study's folder.

    Raises:
        ValueError: another number of them.
    """
    given = [item for item in args.overrides if "=" not in item]
    args.overrides = [item for item in args.overrides if "=" in item]
    root, name = root_and_name(args)
    if not given and count == 1 and name is not None:
        given = [name]
    if len(given) != count:
        raise ValueError(f"expected {count} studies, got {len(given)}. Use: {usage}")
    found = []
    for item in given:
        place = Path(item)
        is_folder = "/" in item.rstrip("/") and place.absolute().parent.name == "studies"
        found.append((str(place.absolute().parents[1]), place.absolute().name) if is_folder else (root, item))
    return found


def _formats(text: str) -> list[str]:
    from dashboards.report.paper import FORMATS

    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    if not kinds or set(kinds) - set(FORMATS):
        raise ValueError(f"--format must name some of {', '.join(FORMATS)}, got {text!r}. For example: pdf,svg.")
    return kinds


def figure(args: Any) -> int:
    """``solvus figure STUDY --out DIR``."""
    from dashboards.report import build, paper
    from dashboards.report.study import open_view

    ((root, name),) = _named(args, 1, "solvus figure STUDY --out DIR")
    kinds = _formats(args.format)
    view = open_view(root, name)
    if not view.complete:
        raise ValueError(f"study {name} has no complete trial to draw. Run it: solvus run study={name}")
    sections = build.sections(view, pictures=False)
    charts = [chart for section in sections for chart in section.charts]
    tables = [table for section in sections for table in section.tables]
    files = [str(path) for path in paper.save(charts, tables, Path(args.out), kinds)]
    emit(args, {"files": files, "notices": view.notices}, "\n".join([*(f"note: {n}" for n in view.notices), *files]))
    return COMPLETE


def compare(args: Any) -> int:
    """``solvus compare A B``."""
    from dashboards.report import compare as comparing
    from dashboards.report import paper
    from dashboards.report.study import open_view

    a, b = _named(args, 2, "solvus compare A B [--out DIR]")
    kinds = _formats(args.format)
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
