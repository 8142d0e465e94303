"""The reference pages of the documentation site, made from the registries and from the parser: one page a plug-in, one
for the command line. ``scripts/documentation.py`` puts them into the site; they are not committed."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from orchestrator import cli
from orchestrator.registries import EVERY
from tasks.registry import type_name

DOCS = Path(__file__).resolve().parent.parent / "docs"
SECTIONS = ("Reference", "Cost and order", "Cost", "Identities")


def pages() -> dict[str, str]:
    """Markdown by its place in the site."""
    measured = list(_table_rows())
    found = {"reference/cli.md": command_line(), "reference/index.md": _contents()}
    for kind, registry in EVERY.items():
        found[f"reference/{kind}/index.md"] = _of_kind(kind)
        for name in registry.names():
            found[f"reference/{kind}/{name}.md"] = plugin(kind, name, measured)
    return found


def _contents() -> str:
    lines = ["# Reference", "", "Every plug-in, from its own source: summary, fields, formula, reference, cost.", ""]
    lines += [f"* [{kind}]({kind}/index.md): {len(registry.names())} plug-ins" for kind, registry in EVERY.items()]
    return "\n".join([*lines, "* [the command line](cli.md)", ""])


def _of_kind(kind: str) -> str:
    rows = [f"| [{name}]({name}.md) | {_cell(_markdown(_summary(kind, name)))} |" for name in EVERY[kind].names()]
    return "\n".join([f"# {kind}", "", f"| `{kind}=` | |", "|---|---|", *rows, ""])


def _summary(kind: str, name: str) -> str:
    return (inspect.getdoc(EVERY[kind].get(name)) or "").splitlines()[0]


def plugin(kind: str, name: str, measured: list[tuple[str, str, str, str]]) -> str:
    """The page of one plug-in."""
    cls, defaults = EVERY[kind].get(name), EVERY[kind].defaults(name)
    body, args, sections = _parts(inspect.getdoc(cls) or "")
    hints = typing.get_type_hints(cls)
    lines = [f"# {name}", "", f"A {kind}: `solvus show {name}` prints this too.", "", body, "", "## Fields", ""]
    if fields(cls):
        lines += [f"| `{kind}.` | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{f.name}` | {_cell(type_name(hints[f.name]))} | `{_cell(json.dumps(defaults[f.name]))}` "
            f"| {_cell(args.get(f.name, ''))} |"
            for f in fields(cls)
        ]
    else:
        lines += ["None."]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text]
    is_only = sum(name in registry.names() for registry in EVERY.values()) == 1
    tables = [row for row in measured if is_only and _same(row[3], name)]
    if tables:
        lines += ["", "## Measured"]
    for place in dict.fromkeys(row[:3] for row in tables):
        page, title, header = place
        lines += ["", f"{title} ([{page}](../../{page})):", "", header, "|" + "---|" * (header.count("|") - 1)]
        lines += [row[3] for row in tables if row[:3] == place]
    return "\n".join(lines) + "\n"


def _parts(doc: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """A docstring's text, what it says of every argument, and its sections, as Markdown."""
    blocks = re.split(rf"^(Args|Returns|Raises|{'|'.join(SECTIONS)}):", doc, flags=re.MULTILINE)
    named = dict(zip(blocks[1::2], blocks[2::2], strict=True))
    args = {
        name.strip(): _markdown(" ".join(text.split()))
        for names, text in re.findall(r"^ {4}([\w, ]+):(.*(?:\n {5,}.*)*)", named.get("Args", ""), re.MULTILINE)
        for name in names.split(",")
    }
    sections = {title: _markdown(inspect.cleandoc(named[title]).strip()) for title in SECTIONS if title in named}
    return _markdown(blocks[0].strip()), args, sections


def _markdown(text: str) -> str:
    """Docstrings write code in double backquotes; outside of it, and of indented formulas, Markdown must not read."""
    paragraphs = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text).split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if not paragraph.startswith("    "):
            pieces = paragraph.split("``")
            pieces[::2] = [re.sub(r"(?<!`)([*<_|])(?!`)", r"\\\1", piece) for piece in pieces[::2]]
            paragraphs[i] = "`".join(pieces)
    return "\n\n".join(paragraphs)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def _table_rows() -> Iterator[tuple[str, str, str, str]]:
    """(page, section, header, row) of the rows with numbers in all committed tables."""
    for path in sorted(DOCS.glob("*.md")):
        section, header = "", ""
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                section = line.lstrip("# ").replace("`", "")
            if not line.startswith("|"):
                header = ""
            elif not header:
                header = line
            elif sum(any(c.isdigit() for c in cell) for cell in line.split("|")[2:-1]) * 2 > line.count("|") - 2:
                yield path.name, section, header, line


def _same(row: str, name: str) -> bool:
    """Whether a row is about a plug-in: ``GHVB 1.8`` and ``DPM-Solver-v3, order 2`` are."""
    head = row.split("|")[1].strip().strip("`").split(",")[0]
    head = re.sub(r"( [\d.]+)+$", "", head).lower()
    return re.sub(r"[\s_-]", "", head) == name.replace("_", "")


def command_line() -> str:
    """Every verb with its options, from the parser."""
    top = cli.parser()
    helps = {
        choice.dest: choice.help or "" for action in top._actions for choice in getattr(action, "_choices_actions", [])
    }
    lines = ["# The command line", "", "```text", cli.EPILOG.strip(), "```", ""]
    for name, verb in cli.verbs_of(top).items():
        usage = " ".join(verb.format_usage().removeprefix("usage: ").split())
        lines += [f"## solvus {name}", "", _markdown(helps[name]) + ".", "", "```text", usage, "```", ""]
        options = [action for action in verb._actions if action.help and action.dest != "help"]
        lines += ["| | |", "|---|---|"]
        lines += [
            f"| `{_cell(_option(action))}` | {_cell(_markdown(action.help % vars(action)))} |" for action in options
        ]
        lines += [""]
    return "\n".join(lines)


def _option(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings)
    value = action.metavar or (action.dest if not name else action.dest.upper())
    takes = action.nargs != 0
    return " ".join([*([name] if name else []), *([str(value)] if takes else [])])
