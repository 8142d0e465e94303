"""A table as plain data, and what people copy it as: CSV with all digits, LaTeX with those that mean something."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "−": "$-$", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A value with the half-width of its 95 % interval (None: not known), and the sign shown if it is a difference."""

    value: float | None
    half: float | None = None
    signed: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return ""
        shown = f"{self.value:{'+' if self.signed else ''}.4g}"
        return shown if self.half is None else f"{shown} ± {self.half:.2g}"


@dataclass(frozen=True)
class Table:
    """Rows of cells: text, whole numbers, numbers, :class:`Measured` or None. ``name`` is what its file is called."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def shown(self) -> list[list[str]]:
        """Every cell as people read it."""
        return [[show(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers only."""
        return [
            all(row[i] is None or isinstance(row[i], int | float | Measured) for row in self.rows)
            for i in range(len(self.head))
        ]

    def csv(self) -> str:
        """Every digit; a measured column is followed by the half-widths of its intervals."""
        measured = [any(isinstance(row[i], Measured) for row in self.rows) for i in range(len(self.head))]
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        head: list[str] = []
        for name, is_measured in zip(self.head, measured, strict=True):
            head += [name, f"{name} half-width"] if is_measured else [name]
        writer.writerow(head)
        for row in self.rows:
            cells: list[Any] = []
            for cell, is_measured in zip(row, measured, strict=True):
                if is_measured:
                    cells += [cell.value, cell.half] if isinstance(cell, Measured) else [cell, None]
                else:
                    cells.append(cell)
            writer.writerow(["" if cell is None else cell for cell in cells])
        return sink.getvalue()

    def text(self) -> str:
        """Columns side by side, for a terminal."""
        lines = [list(self.head), *self.shown()]
        wide = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        numbers = self.numeric()
        return "\n".join(
            "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, wide, numbers, strict=True)).rstrip()
            for line in lines
        )

    def latex(self) -> str:
        """A tabular of package booktabs."""
        columns = "".join("r" if number else "l" for number in self.numeric())
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in self.shown()]
        return "\n".join(
            [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_latex, self.head)) + r" \\", r"\midrule",
             *lines, r"\bottomrule", r"\end{tabular}", ""]
        )  # fmt: skip


def show(cell: Any) -> str:
    """One cell as people read it."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    if isinstance(cell, float):
        return f"{cell:.4g}" if math.isfinite(cell) else "not a number"
    return str(cell)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
