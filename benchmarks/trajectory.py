"""How far few-step samples of the embedded models are from the many-step solution, and how good that solution is.

    python -m benchmarks.trajectory [--quick] [--json] [--samples 256]

reference/*  distance of a many-step solution to Heun with 256 steps (511 evaluations), per element
error/*      the metric ``trajectory`` with its defaults, and its standard error
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness import Figure, arguments, publish
from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate, score

GRIDS = {"digits": ("quadratic", "logsnr"), "digits_flow": ("uniform", "uniform")}  # for few steps, for many
SOLVERS = {"dpmpp_2m": {"name": "dpmpp_2m"}, "unipc": {"name": "unified", "preset": "unipc"}}
REFERENCES = ((64, "dpmpp_2m"), (128, "dpmpp_2m"), (32, "heun"), (64, "heun"))


def recipe(model: str, solver: Any, times: str, steps: int) -> Recipe:
    """One trajectory a sample of an embedded model, without guidance."""
    made = Recipe(model, solver, {"name": times, "num_steps": steps}, "none", "single")  # type: ignore[arg-type]
    return made.completed()


_MADE: dict[str, dict[str, np.ndarray]] = {}


def rows(of: Recipe, count: int) -> dict[str, np.ndarray]:
    """Rows [0, count) of a recipe, made once."""
    if of.key not in _MADE:
        _MADE[of.key] = generate(of, 0, count)
    return _MADE[of.key]


def error(of: Recipe, count: int, **fields: Any) -> tuple[float, float]:
    """The metric and its standard error."""
    metric = registry.metrics.build({"name": "trajectory", **fields})
    (need,) = metric.needs()
    other = of.companion(need)
    assert other is not None
    mine = rows(of, count)
    column = score(need, mine["x0"], mine["label"], 0, of.batch_size, "cpu", rows(other, count)["x0"])
    table = {need["name"]: column}
    summary = metric.summarize(table)
    (value,), (effect,) = metric.compute(summary, None).values(), metric.influence(summary, None, table).values()
    return value, float(effect.std() / np.sqrt(count))


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "", ("--samples", {"type": int, "default": 256}))
    count = 32 if options.quick else options.samples
    figures = []
    for model, (few, many) in GRIDS.items():
        for steps, solver in REFERENCES[:1] if options.quick else REFERENCES:
            limit = {"solver": {"name": "heun"}, "num_steps": 256}
            value, spread = error(recipe(model, solver, many, steps), count, **limit)
            nfe = recipe(model, solver, many, steps).nfe
            name = f"reference/{model}/{solver}/{nfe} evaluations"
            figures.append(Figure(name, value, f"± {spread:.1g}", "lower"))
        for solver, spec in SOLVERS.items():
            for nfe in (5, 8):
                value, spread = error(recipe(model, spec, few, 2).override({"nfe": nfe}), count)
                figures.append(Figure(f"error/{model}/{few}/{solver}/{nfe}", value, f"± {spread:.1g}", "lower"))
    publish(figures, options.json)


if __name__ == "__main__":
    main()
