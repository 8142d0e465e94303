"""Error of particle methods against the number of particles, on a mixture whose tilt is known.

    python -m benchmarks.scaling_exact [--quick] [--json] [--particles 4,16,64,256,1024]

The law is a mixture of three Gaussians in one dimension, tilted by ``exp(-(x - 1.5)^2)``; 20 steps of its exact reverse
kernel (correctors: 200 of their own), so that what is left is the error of K particles. A cell is the root mean square
error over runs of the mean, the variance and log Z; the rate is the slope of its logarithm over log K, which is -1/2
for self-normalised estimates. SVDD keeps one chain a sample and has no Z: its columns are children, and the error is
the bias of its law (over 12,000 chains), which for the exact value falls as 1/K and for the posterior mean does not.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Figure, arguments, publish
from tasks import registry
from tasks.noise import RowNoise
from tasks.processes import VP, Flow
from tasks.sampler import Sampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tasks"))
from oracles import GAUSS, GM1D, Denoiser, ExactKernel, Mixture, uniform, weighted_moments  # noqa: E402

Errors = tuple[float, float, float]
FK = {"name": "fk_steering", "strength": 2.0, "every": 4, "first": 4, "lag": False}
METHODS: list[tuple[str, Mixture, dict[str, Any]]] = [
    ("FK difference", GM1D, FK),
    ("FK difference, ESS", GM1D, FK | {"trigger": "ess"}),
    ("FK max, scaled", GM1D, FK | {"potential": "max", "potential_scale": 0.25}),
    ("FK immediate, scaled", GM1D, FK | {"potential": "immediate", "potential_scale": 0.25}),
    ("FK sum, scaled", GM1D, FK | {"potential": "sum", "potential_scale": 0.125}),
    ("no resampling", GM1D, FK | {"trigger": "never"}),
    ("DAS, one Gaussian", GAUSS, {"name": "das", "strength": 4.0, "tempering": "linear"}),
    ("FKC tilt", GM1D, {"name": "fkc", "strength": 2.0, "trigger": "ess"}),
]


def particles(law: Mixture, spec: dict[str, Any], count: int, runs: int) -> Errors:
    """Root mean square errors of one method at one K."""
    strategy = registry.strategies.build(spec | {"particles": count, "output": "all"})
    own = spec["name"] == "fkc"
    solver = registry.solvers.build({"name": "ddim", "eta": 1.0}) if own else ExactKernel(law)
    process = Flow() if own or law is GAUSS else VP()
    sampler = Sampler(Denoiser(law, process), solver, uniform(200 if own else 20))
    noise = RowNoise(0, torch.arange(runs), dtype=torch.float64)
    with torch.no_grad():
        columns = strategy(sampler, registry.rewards.build(law.reward()), noise).columns
    mean, variance = weighted_moments(columns["candidates"].view(runs, count), columns["log_weights"])
    exact = law.tilted()
    errors = [mean - exact[0], variance - exact[1], columns["log_z"] - exact[2]]
    found = [float(e.square().mean().sqrt()) for e in errors]
    return found[0], found[1], found[2]


def chains(exact_value: bool) -> Callable[[int, int], Errors]:
    """The bias of SVDD's law at M children."""

    def measure(count: int, rows: int) -> Errors:
        spec = {"name": "svdd", "children": count, "strength": 2.0, "selection": "softmax", "select_last": True}
        strategy = registry.strategies.build(spec)
        sampler = Sampler(Denoiser(GM1D, VP()), ExactKernel(GM1D), uniform(20))
        noise = RowNoise(0, torch.arange(rows), dtype=torch.float64)
        with torch.no_grad():
            if exact_value:
                x = strategy.decode(sampler, lambda c, _, __: GM1D.value(VP(), c.x, sampler.times[c.step]), noise).x0
            else:
                x = strategy(sampler, registry.rewards.build(GM1D.reward()), noise).x0
        exact = GM1D.tilted()
        return abs(float(x.mean()) - exact[0]), abs(float(x.var()) - exact[1]), math.nan

    return measure


def slope(counts: list[int], errors: list[float]) -> float:
    """Of log error over log K."""
    return float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def main() -> None:
    """Print the table."""
    args = arguments(__doc__, ("--particles", {"default": "4,16,64,256,1024", "help": "numbers of particles"}))
    counts = [int(v) for v in args.particles.split(",")]
    total = 8192 if args.quick else 65536
    methods: list[tuple[str, Callable[[int, int], Errors]]] = [
        (name, lambda k, n, law=law, spec=spec: particles(law, spec, k, n)) for name, law, spec in METHODS
    ]
    figures = []
    print("| method | figure | " + " | ".join(f"K = {k}" for k in counts) + " | rate |")
    print("|---|---|" + "---|" * (len(counts) + 1))
    for name, measure in methods:
        _table(name, counts, [measure(k, max(16, total // k)) for k in counts], figures, "RMSE")
    few = [k for k in counts if k <= 64]
    for name, exact_value in (("SVDD, exact value", True), ("SVDD, posterior mean", False)):
        measure = chains(exact_value)
        found = [measure(k, 2000 if args.quick else 12000) for k in few]
        _table(name, few, found, figures, "bias", len(counts) - len(few))
    print()
    publish(figures, args.json)


def _table(
    name: str, counts: list[int], found: list[Errors], figures: list[Figure], what: str, missing: int = 0
) -> None:
    """The lines of one method."""
    for j, column in enumerate(("mean", "variance", "log Z")):
        values = [errors[j] for errors in found]
        if math.isnan(values[0]):
            continue
        rate = slope(counts, values)
        cells = [f"{v:.3f}" for v in values] + ["" for _ in range(missing)]
        print(f"| {name} | {what} of {column} | " + " | ".join(cells) + f" | {rate:.2f} |", flush=True)
        figures.append(Figure(f"{name}, rate of {column}", rate, "", "lower"))


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
