"""The trial table as the report sees it: labels, groups and comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tasks import registry

# What a trial table of another version may lack.
DEFAULTS: dict[str, Any] = {
    "number": -1, "part": "", "state": "unknown", "reason": "", "quarantined": "{}", "title": "", "overrides": "{}",
    "recipe": "{}", "times": "[]", "key": "", "first_index": 0, "num_samples": 0, "nfe": 0, "commit": "",
}  # fmt: skip
KINDS = ("model", "solver", "times", "guidance", "strategy")


@dataclass(frozen=True)
class Row:
    """One trial of the stored table."""

    data: dict[str, Any]

    @classmethod
    def of(cls, data: dict[str, Any]) -> Row:
        """A row of the stored table; what it lacks is filled with what says so."""
        return cls(DEFAULTS | {name: value for name, value in data.items() if value is not None})

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's specs."""
        return {kind: {"name": "unknown"} for kind in KINDS} | json.loads(self.data["recipe"])

    @cached_property
    def times(self) -> list[float]:
        """The time grid."""
        return json.loads(self.data["times"])

    @property
    def solver(self) -> str:
        """Solver by the name people know it by."""
        spec = self.recipe["solver"]
        if spec["name"] == "diffusers":
            return str(spec["scheduler"]).removesuffix("Scheduler").removesuffix("Multistep").removesuffix("Discrete")
        if spec["name"] == "unified":
            name = spec["preset"] if spec.get("steps") is None else "own schedule"
            changed = [str(spec[key]) for key in ("max_order", "corrector", "kappa") if spec.get(key) is not None]
            changed += [hook["name"] for hook in spec.get("hooks") or []]
            return f"{name} ({', '.join(changed)})" if changed else name
        if "filters" in spec:
            return _token_solver(spec)
        extra = f" (eta={spec['eta']:g})" if spec.get("eta") else ""
        return {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M", "heun": "Heun", "euler": "Euler"}.get(
            spec["name"], spec["name"]
        ) + extra

    @property
    def grid(self) -> str:
        """Time grid in a word or two."""
        spec = self.recipe["times"]
        if spec["name"] == "stock":
            config = self.recipe["solver"].get("config", {})
            return ", ".join(f"{k.removeprefix('use_')}" if v is True else str(v) for k, v in config.items()) or "stock"
        return "searched" if spec["name"] == "ratios" or self.schedule is not None else spec["name"]

    @property
    def schedule(self) -> dict[str, Any] | None:
        """The whole schedule as data, where its steps were given one by one."""
        recipe = self.recipe
        if recipe["solver"].get("steps") is None or recipe["times"]["name"] != "explicit":
            return None
        return {"solver_schedule": 1, "times": recipe["times"]["values"], "steps": recipe["solver"]["steps"]}

    @property
    def baseline(self) -> str:
        """The name of a known schedule that a search tried first; empty for its proposals."""
        return self.data.get("baseline") or ""

    @property
    def stopped(self) -> bool:
        """Whether a race stopped it before it had all its samples."""
        return bool(self.data.get("stopped"))

    @property
    def nfe(self) -> int:
        """Evaluations along one trajectory of one particle."""
        return self.data["nfe"] // self.particles

    @property
    def particles(self) -> int:
        """N of best-of-N, else 1."""
        spec = self.recipe["strategy"]
        return spec.get("n", 1) if spec["name"] == "best_of_n" else 1

    @property
    def strategy(self) -> str:
        """The strategy and the number of candidates that it is named by."""
        spec = self.recipe["strategy"]
        sizes = ("n", "max_n", "particles", "children", "width", "rounds", "max_nfe", "iterations")
        return " ".join([spec["name"], *(f"{key}={spec[key]}" for key in sizes if key in spec)])

    @property
    def gives(self) -> str:
        """What its samples are: draws of a law (with the bias that stays, where there is one), or optima."""
        spec = self.recipe["strategy"]
        if spec["name"] not in registry.strategies.names():  # a table of another version
            return ""
        strategy = registry.strategies.build(spec)
        if getattr(strategy, "semantics", "sample") == "best":
            return "best"
        bias = getattr(strategy, "bias", "")
        return f"sample, biased: {bias}" if bias else "sample"

    @property
    def span(self) -> tuple[int, int]:
        """Range of sample indices, as (first, count)."""
        return self.data["first_index"], self.data["num_samples"]

    @property
    def name(self) -> str:
        """What people call it."""
        return self.baseline or f"trial {self.data['number']}"

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        several = f", {self.strategy}" if self.recipe["strategy"]["name"] not in ("single", "unknown") else ""
        return f"{self.name}: {self.solver}, {self.grid}, {self.data['nfe']:g} evaluations{several}"

    @property
    def quarantined(self) -> dict[str, str]:
        """Rows that were set aside, by index, with reasons."""
        return json.loads(self.data["quarantined"])

    @property
    def complete(self) -> bool:
        """Whether it has values."""
        return self.data["state"] in ("complete", "degraded")

    @property
    def held_out(self) -> bool:
        """Whether it was measured on samples that no search saw."""
        return str(self.data["part"]).endswith("held_out")

    def value(self, name: str) -> float | None:
        """A value of the trial; None where it has none, or one that is not a number."""
        found = self.data.get(f"value/{name}")
        return found if found is not None and math.isfinite(found) else None

    def measured(self, name: str) -> float:
        """A value that is known to be there."""
        value = self.value(name)
        assert value is not None, name
        return value

    def error(self, name: str) -> float:
        """Its standard error."""
        return self.data.get(f"se/{name}") or 0.0


COSTS = {"nfe": "network evaluations", "reward_calls": "reward calls", "decodes": "decoder calls"}
TOLERANCE = 0.05  # costs further apart than this are not equal


def cost(row: Row, name: str) -> float:
    """What one sample cost; 0 where older rows do not say."""
    return row.value(f"cost/{name}") or 0.0


def costs(row: Row) -> str:
    """The cost of one sample in words."""
    found = [f"{cost(row, name):.4g} {words}" for name, words in COSTS.items() if name == "nfe" or cost(row, name)]
    seconds = row.data.get("seconds")
    return ", ".join(found + ([f"{seconds:.3g} device-seconds"] if seconds else []))


def unequal(a: Row, b: Row) -> str:
    """A warning where the counted costs of a sample differ by more than 5 %; empty where they are equal."""
    differ = []
    for name, words in COSTS.items():
        x, y = cost(a, name), cost(b, name)
        if abs(x - y) > TOLERANCE * max(x, y):
            differ.append(f"{x:.4g} against {y:.4g} {words}")
    return f"Costs differ: {'; '.join(differ)} a sample" if differ else ""


def value_names(rows: Iterable[Row], order: Iterable[str]) -> list[str]:
    """All values that some trial has, in the order of the study's metrics: the first quality is the one that counts."""
    names = {key.removeprefix("value/") for row in rows for key in row.data if key.startswith("value/")}
    known = [name for name in order if name in names]
    return known + sorted(names - set(known))


def parts(rows: list[Row]) -> dict[str, list[Row]]:
    """Complete trials by part, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.complete:
            found.setdefault(row.data["part"] or "trials", []).append(row)
    return found


def compared(rows: list[Row]) -> list[Row]:
    """The trials whose values may be set side by side: held-out ones where there are any, else all single ones."""
    single = [row for row in rows if row.complete and row.recipe["strategy"]["name"] == "single" and not row.stopped]
    return [row for row in single if row.held_out] or single


def best_by_nfe(rows: list[Row], name: str, lower: bool) -> dict[str, list[Row]]:
    """For every solver the best trial at each number of evaluations, by evaluations."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        value = row.value(name)
        if value is None:
            continue
        label = f"{row.solver}, searched" if row.grid == "searched" else row.solver
        key = (label, row.nfe)
        held = best.get(key)
        if held is None or (value < held.value(name)) == lower:  # type: ignore[operator]
            best[key] = row
    series: dict[str, list[Row]] = {}
    for (label, _), row in sorted(best.items()):
        series.setdefault(label, []).append(row)
    return series


def _token_solver(spec: dict[str, Any]) -> str:
    """A solver of tokens with what it does to their probabilities: ancestral (temperature 0.8, top_p 0.9)."""
    said = [str(spec[key]) for key in ("confidence", "learn") if isinstance(spec.get(key), str)]
    said += [f"{key} {spec[key]:g}" for key in ("eta", "k") if spec.get(key)]
    said += [key for key in ("cache", "confident", "loop") if spec.get(key) is True]
    for item in spec["filters"] or ():
        numbers = [f"{value:g}" for key, value in item.items() if key != "name" and isinstance(value, float)]
        said.append(" ".join([item["name"], *numbers[:1]]))
    return f"{spec['name']} ({', '.join(said)})" if said else str(spec["name"])
