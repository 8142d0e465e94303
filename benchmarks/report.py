"""The report of a large study, built and opened in a browser.

A study of 200 trials and 200,000 rows of pictures with scores and features is put into a real store, as workers would
have; its rows are drawn at random, everything else is as always.

build_s         the whole command ``solvus report``, in a process of its own
build_cpu_s     the processor's share of it: the same on a busy machine
size_mb         the page
first_paint_s   until headless Chromium has painted something of it, from disk; median of five
console_errors  errors and warnings of its console, after every figure was drawn
requests        to any host
axe_serious     serious and critical violations that axe-core finds, in light and in dark
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.browser import axe_core, browser, chromium, watch
from benchmarks.harness import ROOT, Figure, arguments, publish

SOLVERS = ("ddim", "euler", "dpmpp_2m", "heun")
GRIDS = ("uniform", "quadratic", "karras", "logsnr")


def synthesise(root: Path, trials: int, rows_each: int, name: str = "large") -> None:
    """A finished study of digits whose rows are random; searched, with held-out winners and two quarantined rows."""
    from orchestrator import config
    from orchestrator.measure import measure, scorers
    from orchestrator.ports import Proposal
    from orchestrator.results import Results
    from orchestrator.store import Store

    metrics = "[frechet,class_accuracy,mean_reward,{name:mean_reward,reward:ink}]"
    asked = ["model=digits", "solver=ddim", f"metrics={metrics}", f"name={name}", f"num_samples={rows_each}"]
    study = config.study(config.compose([*asked, "tracker=none", f"root={root}"]))
    store, results, needs = Store(root), Results(str(root), name), scorers(study.metrics)
    generator = np.random.default_rng(0)
    finished: list[Any] = []
    searched = trials - trials // 20
    for number in range(trials):
        held_out = number >= searched
        source = finished[(number - searched) * 18].proposal.overrides if held_out else _overrides(number, generator)
        first = 2**20 if held_out else 0
        part = "search/held_out" if held_out else "search"
        trial = study.trial(number, Proposal({**source, "first_index": first}, part))
        store.put_json("recipes", trial.recipe.key, _plain(trial.recipe))
        _put(store, trial, needs, generator, noise=1 / trial.recipe.nfe)
        trial.values, trial.errors = measure(trial.recipe, study.metrics, first, first + rows_each, store)
        trial.state, trial.cost = "complete", {"nfe": float(rows_each * trial.recipe.nfe), "generate_s": 1.0}
        if number % 97 == 3:
            trial.state, trial.quarantined = "degraded", {first + 7: "the worker was killed by this row"}
        finished.append(trial)
    results.save_study(study)
    results.save_trials(finished)
    weights = {"nfe": 0.6, "solver": 0.25, "times": 0.15}
    results.save_search(
        [{"part": "search", "search": "tpe", "optuna_study": f"{name}/search", "objectives": ["quality/frechet"],
          "finished": trials, "baselines": 0, "importances": [weights], "racing": None,
          "held_out": "search/held_out"}]
    )  # fmt: skip
    results.save_state("complete", {"wall_s": 1.0, "samples_made": trials * rows_each, "samples_reused": 0})


def _plain(recipe: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(recipe)))


def _overrides(number: int, generator: np.random.Generator) -> dict[str, Any]:
    solver, grid = SOLVERS[number % 4], GRIDS[number // 4 % 4]
    nfe = int(3 + 2 * (number // 16))
    eta = {"solver.eta": float(generator.uniform(0.01, 1))} if solver == "ddim" else {}
    return {"solver": solver, "times": grid, "nfe": nfe + (solver == "heun" and nfe % 2 == 0), **eta}


def _put(store: Any, trial: Any, needs: list[Any], generator: np.random.Generator, noise: float) -> None:
    """Rows and columns of a trial, in two ranges as two workers would."""
    from orchestrator import rows

    recipe, half = trial.recipe, trial.num_samples // 2
    for start, stop in ((0, half), (half, trial.num_samples)):
        start, stop = start + trial.first_index, stop + trial.first_index
        count, index = stop - start, np.arange(start, stop)
        smooth = np.cos(np.arange(8)[None, :] * (0.3 + index[:, None] % 10 / 5))
        x0 = np.clip(smooth[:, None, :, None] * smooth[:, None, None, :], -1, 1)
        x0 = np.clip(x0 + noise * generator.standard_normal(x0.shape), -1, 1).astype(np.float32)
        columns = {
            "sample_id": index.astype(np.int64), "label": index % 10, "nfe": np.full(count, recipe.nfe, np.int32),
            "reward_calls": np.zeros(count, np.int32), "decodes": np.zeros(count, np.int32),
            "seconds": np.full(count, 0.001, np.float32), "x0": x0,
        }  # fmt: skip
        table = rows.to_table(columns, "image", {"recipe": recipe.key})
        origin = {"commit": "0" * 40, "machine": "x86_64/benchmark", "versions": {"torch": "2"}}
        store.put("rows", recipe.key, start, stop, table, {}, origin)
        for spec in needs:
            shape = (count, 64) if spec["name"] == "classifier" else (count,)
            value = (generator.standard_normal(shape) * (1 + noise)).astype(np.float32)
            value = (value > 0).astype(np.float32) if spec["name"] == "class_correct" else value
            store.put("columns", recipe.column_key(spec), start, stop, rows.column_table(value, start), {}, origin)


def look(page: Path, program: str) -> dict[str, float]:
    """Open a page as often as needed, and count what must not be."""
    axe, found = axe_core(), {}
    with browser(program) as running:
        paints = []
        for _ in range(5):
            with watch(running) as watched:
                paints.append(watched.open(page))
        found["first_paint_s"] = statistics.median(paints)
        complaints, requests, serious = [], [], []
        for scheme in ("light", "dark"):
            with watch(running, color_scheme=scheme) as watched:
                watched.open(page)
                watched.scroll_through()
                complaints += watched.complaints
                requests += watched.requests
                serious += watched.serious(axe) if axe else []
    for line in [*complaints, *requests, *serious]:
        print(line, file=sys.stderr)
    found |= {"console_errors": float(len(complaints)), "requests": float(len(requests))}
    return found | ({"axe_serious": float(len(serious))} if axe else {})


def main() -> None:
    """Make the study, build its report, open it."""
    keep = ("--keep", {"metavar": "DIR", "help": "make the study here and keep it; use it where it is there already"})
    args = arguments(__doc__ or "", keep)
    trials, rows_each = (20, 100) if args.quick else (200, 1000)
    wanted = {"first_paint_s": ("s", "<= 1.5"), "console_errors": ("", "0"), "requests": ("", "0"),
              "axe_serious": ("", "0")}  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.keep or temporary)
        if not (root / "studies" / "large" / "state.json").exists():
            synthesise(root, trials, rows_each)
        began = time.perf_counter()
        command = [sys.executable, "-m", "orchestrator.cli", "report", "name=large", f"root={root}"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        build = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = root / "studies" / "large" / "report.html"
        figures = [
            Figure("build_s", build, "s", "lower", f"wanted <= 20, {trials} trials, {trials * rows_each:,} rows"),
            Figure("build_cpu_s", used.ru_utime + used.ru_stime, "s", "lower"),
            Figure("size_mb", page.stat().st_size / 1e6, "MB", "lower", "wanted <= 10"),
        ]
        program = chromium()
        seen = look(page, program) if program else {}
    for name, (unit, limit) in wanted.items():
        if name in seen:
            figures.append(Figure(name, seen[name], unit, "lower", f"wanted {limit}"))
        else:
            why = "axe-core could not be had" if program else "no browser: install chromium, or set SOLVUS_CHROMIUM"
            print(f"{name} not measured: {why}", file=sys.stderr)
    publish(figures, args.json)


if __name__ == "__main__":
    main()
