"""Write docs/methods.md: every registered method with its summary, settings and source. Run by ``make docs``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tasks import registry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
KINDS = (
    "model",
    "solver",
    "hook",
    "filter",
    "times",
    "initial",
    "guidance",
    "strategy",
    "reward",
    "features",
    "metric",
)


def page() -> str:
    """The whole page."""
    lines = [
        "# Methods",
        "",
        "Every plug-in, from its own docstring (`make docs` writes this page; `solvus show NAME` prints one whole).",
        "What was measured: [solvers.md](solvers.md) and [measured.md](measured.md).",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind}", ""]
        for name in registry.ALL[kind].names():
            doc = inspect.getdoc(registry.ALL[kind].get(name)) or ""
            defaults = {k: v for k, v in registry.ALL[kind].defaults(name).items() if k != "name"}
            settings = ", ".join(f"{k}={_short(v)}" for k, v in defaults.items())
            lines.append(f"* **{name}**: {doc.splitlines()[0]}" + (f" Settings: `{settings}`." if settings else ""))
            source = re.search(r"^Reference: (.*?)(?=\n\S|\Z)", doc, re.MULTILINE | re.DOTALL)
            if source:
                lines.append(f"  {' '.join(source.group(1).split())}")
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else "…"


if __name__ == "__main__":
    PAGE.write_text(page())
