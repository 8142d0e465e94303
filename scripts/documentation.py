"""Hooks of mkdocs: put into the site what is not written in ``docs/`` (``mkdocs build`` reads this from mkdocs.yml).

The reference is made from the registries, the notebooks are turned into pages, README, ARCHITECTURE and CONTRIBUTING
become pages, and links to files of the repository lead to copies of them.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File

from orchestrator.registries import EVERY

ROOT = Path(__file__).resolve().parent.parent
TOP = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\[([^\[\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Add the generated pages to the navigation, and written ones that it does not name yet."""
    named = json.dumps(config.nav)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    further = [page for page in pages if f'"{page}"' not in named]
    if further:
        config.nav.append({"Further pages": further})
    kinds = [
        {kind: [f"reference/{kind}/index.md", *(f"reference/{kind}/{name}.md" for name in registry.names())]}
        for kind, registry in EVERY.items()
    ]
    config.nav.append({"Reference": ["reference/index.md", {"Command line": "reference/cli.md"}, *kinds]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the files that pages link to."""
    made = reference.pages()
    made |= {uri: (ROOT / name).read_text() for name, uri in TOP.items()}
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = from_notebook(path)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    sources = [*TOP, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
    for name in sorted({file for source in sources for file in _linked(source)}):
        files.append(File.generated(config, f"files/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that hold in the repository, made to hold in the site."""
    uri = page.file.src_uri
    origin = {site: name for name, site in TOP.items()}.get(uri, f"docs/{uri}")

    def lead(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        if place in TOP:
            place = TOP[place]
        elif place.startswith("docs/"):
            place = place.removeprefix("docs/")
        elif (ROOT / place).is_file():
            place = f"files/{place}"
        elif (ROOT / place).is_dir():
            return match[1]  # a folder has no page: its name stays, without a link
        else:
            return match[0]
        return f"[{match[1]}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{match[3] or ''})"

    return LINK.sub(lead, markdown)


def _linked(source: str) -> set[str]:
    """Files of the repository, outside of the documentation, to which a page links."""
    found = set()
    for _, target, _ in LINK.findall((ROOT / source).read_text()):
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not place.startswith(("docs/", "..")) and place not in TOP and (ROOT / place).is_file():
            found.add(place)
    return found


def from_notebook(path: Path) -> str:
    """A notebook as a page: its text, and its cells as code."""
    cells = json.loads(path.read_text())["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([*parts, f"[This page as a notebook]({path.name})."]) + "\n"
