"""``solvus show NAME`` and ``solvus show schedule FILE``."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import fields
from typing import Any, get_type_hints

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """What."""
    parser.add_argument("name", help="a plug-in, or the word schedule")
    parser.add_argument("file", nargs="?", metavar="FILE", help="a solver schedule as JSON")
    parser.add_argument("--html", metavar="OUT", help="also draw the schedule, as a page of its own")


def call(args: Any) -> int:
    """``solvus show NAME`` and ``solvus show schedule FILE``."""
    from orchestrator.registries import EVERY
    from tasks.registry import type_name, unknown

    if args.name == "schedule":
        return _show_schedule(args)
    for what, value in (("a file", args.file), ("--html", args.html)):
        if value is not None:
            raise ValueError(f"{what} ({value!r}) belongs to `solvus show schedule FILE`, got name {args.name!r}.")
    found = {kind: registry.get(args.name) for kind, registry in EVERY.items() if args.name in registry.names()}
    if not found:
        raise unknown("plug-in", args.name, sorted({n for r in EVERY.values() for n in r.names()}))
    data, lines = {}, []
    for kind, cls in found.items():
        defaults = EVERY[kind].defaults(args.name)
        hints = get_type_hints(cls)  # inherited fields too
        described = {f.name: {"type": type_name(hints[f.name]), "default": defaults[f.name]} for f in fields(cls)}
        data[kind] = {"name": args.name, "fields": described, "doc": inspect.getdoc(cls)}
        lines += [f"{kind} {args.name}", "", inspect.getdoc(cls) or "", "", "Fields:"]
        lines += [f"  {kind}.{n}: {d['type']} = {json.dumps(d['default'])}" for n, d in described.items()] or ["  none"]
    emit(args, data, "\n".join(lines))
    return COMPLETE


def _show_schedule(args: Any) -> int:
    from orchestrator.config import read_schedule

    if args.file is None:
        raise ValueError("show schedule needs a file: solvus show schedule FILE [--html OUT]")
    found = read_schedule(args.file)
    data = json.loads(found.to_json()) | {"nfe": found.nfe, "stochastic": found.stochastic}
    text = found.read_aloud()
    if args.html is not None:
        try:
            found.figure().write_html(args.html, include_plotlyjs=True)
        except OSError as error:
            raise ValueError(f"--html {args.html!r} cannot be written: {error.strerror}. Give another place.") from None
        data, text = data | {"html": args.html}, f"{text}\n{args.html}"
    emit(args, data, text)
    return COMPLETE


VERB = Verb(
    "a plug-in's summary, fields, defaults and reference; or `schedule FILE`, every step in words", call, options
)
