"""A stored study as the report sees it; whatever is missing or damaged becomes a notice, not an error."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dashboards.report.chart import Chart
from dashboards.report.table import Table
from dashboards.report.view import Row, value_names
from orchestrator import measure
from orchestrator.results import Results
from orchestrator.store import CorruptShard, Store
from tasks import registry
from tasks.recipe import Recipe

log = logging.getLogger("solvus")

# What reading rows may come upon: they are not there, are damaged, or were made by a version that had other plug-ins.
GONE = (KeyError, CorruptShard, ValueError, TypeError)


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        lines: sentences of a list. details: (title, text) that is folded away. pictures: strips of samples.
        browser: the data of the sample browser.
    """

    title: str
    text: str = ""
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    details: Sequence[tuple[str, str]] = ()
    pictures: Sequence[dict[str, Any]] = ()
    browser: dict[str, Any] | None = None


class NoStore:
    """Stands where a store cannot be read: it has nothing."""

    def read(self, kind: str, key: str, start: int, stop: int, columns: Any = None) -> Iterator[Any]:
        """Nothing is there."""
        raise KeyError(f"{kind} {key}")

    def get_json(self, kind: str, key: str) -> None:
        """Nothing is there."""

    get_arrays = first_record = get_json

    def quarantined(self, key: str) -> dict[int, str]:
        """Nothing is known."""
        return {}


@dataclass(frozen=True)
class StudyView:
    """What was found of a study.

    Attributes:
        table: the trials. names: their values, the quality that counts first. better: value -> lower or higher.
        searches: what each search says of itself. notices: what is missing, for people.
    """

    name: str
    folder: str
    config: dict[str, Any]
    state: dict[str, Any]
    table: list[Row]
    names: list[str]
    better: dict[str, str]
    searches: list[dict[str, Any]]
    store: Any
    notices: list[str] = field(default_factory=list)

    @property
    def qualities(self) -> list[str]:
        """Values that say how good samples are."""
        return [n for n in self.names if n.startswith("quality/") and n in self.better]

    @property
    def complete(self) -> list[Row]:
        """Trials that have values."""
        return [row for row in self.table if row.complete]

    def is_lower(self, name: str) -> bool:
        """Whether lower values are better."""
        return self.better[name] == "lower"

    def recipe(self, row: Row) -> Recipe:
        """A trial's recipe.

        Raises:
            KeyError: the store does not know it.
        """
        spec = self.store.get_json("recipes", row.data["key"])
        if spec is None:
            raise KeyError(row.data["key"])
        return Recipe(**spec)

    def attempt(self, what: str, make: Callable[[], list[Section]]) -> list[Section]:
        """Some sections; where data from outside breaks them, a notice takes their place and the page goes on."""
        try:
            return make()
        except Exception as error:  # whatever an old, damaged or half-written study holds
            log.warning("report of %s: %s left out", self.name, what, exc_info=True)
            self.notices.append(f"{what} left out: {type(error).__name__}: {error}")
            return []


def open_view(root: str, name: str) -> StudyView:
    """Read what there is of a study.

    Raises:
        ValueError: there is no such study.
    """
    results, notices = Results(root, name), []
    try:
        config = results.study()
    except json.JSONDecodeError as error:
        config = {}
        notices.append(f"study.json is damaged ({error}): what was asked for is not known.")
    try:
        store: Any = Store(root, create=False)
    except ValueError as error:
        store = NoStore()
        notices.append(f"{error} Samples, paired comparisons and provenance are left out.")
    import pyarrow as pa

    try:
        table = [Row.of(data) for data in results.trials()]
    except pa.ArrowInvalid as error:
        table = []
        notices.append(f"the trial table is damaged ({error}). Run the study again: it makes no sample twice.")
    better = _better(config, notices)
    names = value_names(table, better)
    notices += _not_numbers(table, names)
    return StudyView(
        name, str(results.folder), config, results.state(), table, names, better, results.search(), store, notices
    )


def _better(config: dict[str, Any], notices: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for spec in [*(config.get("metrics") or []), "cost"]:
        try:
            for one in measure.accompanied(spec):
                found |= registry.metrics.build(one).better
        except (ValueError, TypeError, KeyError) as error:
            notices.append(f"a metric of this study is not known here, so nothing is ranked by it: {error}")
    return found


def _not_numbers(table: list[Row], names: list[str]) -> list[str]:
    lines = []
    for name in names:
        raw = {row.data["number"]: row.data.get(f"value/{name}") for row in table}
        bad = [str(number) for number, value in raw.items() if value is not None and not abs(value) < float("inf")]
        if bad:
            shown = ", ".join(bad[:10]) + (" …" if len(bad) > 10 else "")
            lines.append(f"{name} is not a number in trial {shown}: left out wherever it would count.")
    return lines
