"""Every solver at every budget: Fréchet distance on the digits, exact trajectory error on mixtures, step overhead.

    python -m benchmarks.solvers [--quick] [--json] [--part quality|trajectory|overhead] [--model digits|digits_flow]
                                 [--nfe 4,8] [--samples 1024] [--keep FILE] [--markdown]

``--keep FILE`` holds what was measured (one JSON line a cell, keyed by the recipe), so that a run which was stopped
goes on where it was. The trajectory error is the root mean square distance of a sample to the end of the exact
probability-flow trajectory from the same noise, in float64.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Figure, arguments, commit, publish
from tasks import calibration, registry
from tasks.intervals import Z95
from tasks.noise import RowNoise
from tasks.recipe import Recipe, grid_of
from tasks.run import generate, load_model, score, use_one_thread
from tasks.sampler import CountedModel, Sampler

NFES = (4, 5, 6, 8, 10, 15, 20, 50)
UNIFIED = (
    "ddim", "dpm_solver_2", "dpm_solver_3", "dpm_solver_2m", "dpm_solver_3m", "dpmpp_2m", "dpmpp_3m",
    "dpmpp_3m_published", "dpmpp_2s", "dpmpp_3s", "dpmpp_2m_sde", "deis", "deis_rho", "deis_log", "unipc", "unipc_bh1",
    "f_pndm", "pndm", "heun", "velocity_2m",
)  # fmt: skip


def unified(preset: str, **fields: Any) -> dict[str, Any]:
    """A spec of the unified solver."""
    return {"name": "unified", "preset": preset} | fields


def hooked(preset: str, **hook: Any) -> dict[str, Any]:
    """A preset with one hook."""
    return unified(preset, hooks=[hook])


# name, overrides, and the models it is for (all where left out).
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((preset, {"solver": unified(preset)}) for preset in UNIFIED),
    ("ddim, eta 1", {"solver": {"name": "ddim", "eta": 1.0}}),
    ("ddim, AFS", {"solver": unified("ddim", first="noise")}),
    ("EDM churn 10", {"solver": unified("heun", churn=10.0, churn_max=50.0)}),
    ("mixed ODE/SDE window", {"solver": unified("dpmpp_2m", kappa=1.0, window=[0, 2])}),
    ("predictor-corrector", {"solver": "predictor_corrector"}),
    ("flow SDE", {"solver": "flow_sde"}),
    ("rectified flow", {"solver": "rectified_flow"}),
    ("DPM-Solver-v3", {"solver": "dpm_solver_v3"}),
    ("DPM-Solver-v3, order 2", {"solver": {"name": "dpm_solver_v3", "max_order": 2, "corrector": False}}),
    ("DPM-Solver-v3, order 2C", {"solver": {"name": "dpm_solver_v3", "max_order": 2}}),
    ("DC-Solver", {"solver": hooked("unipc", name="compensation")}),
    ("heavy ball 0.8, 2M", {"solver": hooked("dpmpp_2m", name="heavy_ball")}),
    ("GHVB 1.8", {"solver": {"name": "ghvb", "max_order": 2, "beta": 0.8}}),
    ("GHVB 1.3", {"solver": {"name": "ghvb", "max_order": 2, "beta": 0.3}}),
    ("GHVB 3.8", {"solver": {"name": "ghvb", "max_order": 4, "beta": 0.8}}),
    ("time shift, DDIM", {"solver": hooked("ddim", name="time_shift")}),
    ("time shift, 2M", {"solver": hooked("dpmpp_2m", name="time_shift")}),
    ("DualFast, DDIM", {"solver": hooked("ddim", name="dual_fast")}),
    ("DualFast, 2M", {"solver": hooked("dpmpp_2m", name="dual_fast")}),
    ("DualFast, UniPC", {"solver": hooked("unipc", name="dual_fast")}),
    ("teleport, 2M", {"solver": unified("dpmpp_2m"), "initial": "teleport"}),
    ("DMCMC, 2M", {"solver": unified("dpmpp_2m"), "initial": "dmcmc"}),
    ("DPM-OT, 2M", {"solver": unified("dpmpp_2m"), "initial": "dpm_ot"}),
    ("few-step grid, 2M", {"solver": unified("dpmpp_2m"), "times": "few_step"}),
    ("time travel, DDIM", {"solver": unified("ddim"), "times": "travel"}),
    ("Karras grid, 2M", {"solver": unified("dpmpp_2m"), "times": "karras"}),
    ("log-SNR grid, 2M", {"solver": unified("dpmpp_2m"), "times": "logsnr"}),
    ("DP steps (BOSS), DDIM", {"solver": unified("ddim"), "times": "dp_steps"}),
    ("DP steps (BOSS), 2M", {"solver": unified("dpmpp_2m"), "times": "dp_steps"}),
    ("optimal steps (OSS), DDIM", {"solver": unified("ddim"), "times": "optimal_steps"}),
    ("GITS, 2M", {"solver": unified("dpmpp_2m"), "times": "gits"}),
    ("AYS, 2M", {"solver": unified("dpmpp_2m"), "times": "ays"}),
    ("consistency", {"model": "digits_consistency", "solver": "consistency"}),
    ("CTM, gamma 0.5", {"model": "digits_consistency", "solver": {"name": "ctm", "gamma": 0.5}}),
    ("TCD", {"model": "digits_consistency", "solver": "tcd"}),
    ("LCM", {"model": "digits_consistency", "solver": "lcm"}),
]
STOCHASTIC = {"ddim, eta 1", "dpmpp_2m_sde", "EDM churn 10", "mixed ODE/SDE window", "predictor-corrector", "flow SDE"}
STOCHASTIC |= {"DMCMC, 2M", "DPM-OT, 2M", "time travel, DDIM"}


def base(model: Any) -> Recipe:
    """What every cell starts from; the grid is the one that suits the model's schedule best among the plain ones."""
    name = model if isinstance(model, str) else model["name"]
    plain = {"guidance": {"name": "none"}, "strategy": {"name": "single"}}
    return Recipe(
        model={"name": model} if isinstance(model, str) else model,
        solver={"name": "ddim"},
        times={"name": "quadratic" if name == "digits" else "uniform", "num_steps": 10},
        **plain,
    ).completed()


def recipe_of(model: Any, overrides: dict[str, Any], nfe: int) -> Recipe | None:
    """The recipe that spends exactly ``nfe``; None where the method cannot, or does not fit the model."""
    try:
        recipe = base(model).override(dict(overrides))
        if recipe.initial["name"] == "dmcmc":  # half of the budget for the chain
            moves = nfe // 2 - 1
            recipe = recipe.override({"initial.num_moves": moves, "nfe": nfe - moves - 1})
        elif recipe.times["name"] == "travel":  # two steps are walked twice
            recipe = recipe.override({"times.base": {"name": "uniform", "num_steps": nfe - 2}, "times.last": 2})
        else:
            recipe = recipe.override({"nfe": nfe})
        recipe.check()
    except ValueError:
        return None
    return recipe if recipe.nfe == nfe else None


class Kept:
    """Measured cells in a file of JSON lines."""

    def __init__(self, path: str | None, only: bool = False) -> None:
        self._path, self._only, self._found = path, only, {}
        if path and Path(path).exists():
            lines = Path(path).read_text().splitlines()
            self._found = {row["key"]: row["value"] for row in map(json.loads, lines)}

    def get(self, key: str, make: Any) -> Any:
        """The kept value of a key, or a new one; None where only kept ones are asked for."""
        if key not in self._found and self._only:
            return None
        if key not in self._found:
            self._found[key] = make()
            if self._path:
                with open(self._path, "a") as file:
                    file.write(json.dumps({"key": key, "value": self._found[key]}) + "\n")
        return self._found[key]


@lru_cache(maxsize=4)
def _reference(model: str) -> Any:
    metric = registry.metrics.build("frechet")
    plugin = registry.models.build(model)

    def features(spec: Any, samples: Any, labels: Any) -> np.ndarray:
        return score(spec, np.asarray(samples, dtype=np.float32), np.asarray(labels), 0, 256, "cpu")

    return metric.reference(plugin, features)


def frechet(recipe: Recipe, samples: int) -> tuple[float, float]:
    """Fréchet distance of a recipe's samples to its data, and its standard error (infinitesimal jackknife)."""
    rows = generate(recipe, 0, samples)
    metric = registry.metrics.build("frechet")
    (need,) = metric.needs()
    column = {metric.features: score(need, rows["x0"], rows["label"], 0, 256, "cpu")}
    summary, reference = metric.summarize(column), _reference(recipe.model["name"])
    value = metric.compute(summary, reference)["quality/frechet"]
    effect = metric.influence(summary, reference, column)["quality/frechet"]
    return value, float(np.std(effect) / np.sqrt(samples))


def quality(models: list[str], samples: int, nfes: tuple[int, ...], kept: Kept) -> Iterator[tuple[str, str, list[str]]]:
    """(model, solver, cells) of the table of distances."""
    for model in models:
        for name, overrides in VARIANTS:
            own = overrides.get("model", model)
            if "model" in overrides and model != "digits":
                continue
            rest = {k: v for k, v in overrides.items() if k != "model"}
            cells = []
            for nfe in nfes:
                recipe = recipe_of(own, rest, nfe)
                if recipe is None:
                    cells.append("–")
                    continue

                def measure(recipe: Recipe = recipe) -> Any:
                    try:
                        return frechet(recipe, samples)
                    except ValueError as error:
                        return str(error)

                found = kept.get(f"{recipe.key}/{samples}", measure)
                if found is None:
                    cells.append("not measured")
                    continue
                cells.append("diverged" if isinstance(found, str) else f"{found[0]:.2f} ± {Z95 * found[1]:.2f}")
            if any(cell != "–" for cell in cells):
                yield model, name, cells


# --- trajectory error -------------------------------------------------------------------------------------------------

MIXTURES = {
    "2-D mixture": {"name": "gmm"},
    "64-D digits mixture": {"name": "gmm", "fit": "digits"},
    "64-D, guided": {"name": "gmm", "fit": "digits", "labels": True},
    "digits network": {"name": "digits"},
    "digits network, guided": {"name": "digits"},
}
SCALES = {"64-D, guided": 7.5, "digits network, guided": 5.0}
ROWS = 64


def run_exact(recipe: Recipe, first: int = 0) -> torch.Tensor:
    """End states in float64, (ROWS, D)."""
    parts = calibration.bound(recipe, calibration.make_all(recipe))
    grid, stock_steps = grid_of(parts)
    counted = CountedModel(load_model(recipe), 10**6)
    cond = torch.tensor([recipe.label(i) for i in range(ROWS)]) if counted.num_classes else None
    sampler = Sampler(parts.guidance.wrap(counted), parts.solver, grid, cond, stock_steps, parts.initial)
    with torch.no_grad():
        return sampler.run(RowNoise(0, torch.arange(first, first + ROWS), dtype=torch.float64)).x


@lru_cache(maxsize=8)
def _target(text: str) -> torch.Tensor:
    recipe = Recipe(**json.loads(text))
    # A network is smooth enough for fewer steps, and every one of them costs.
    steps = 1000 if recipe.model["name"] == "gmm" else 200
    fine = {"solver": unified("dpmpp_3m"), "times.num_steps": steps}
    return run_exact(recipe.override(fine))


def trajectory_error(recipe: Recipe) -> float:
    """Root mean square distance to the end of the exact (for a network: of a fine) trajectory from the same noise."""
    plain = base(recipe.model).override({"guidance": recipe.guidance, "dtype": "float64"})
    return float((run_exact(recipe) - _target(_text(plain))).square().mean().sqrt())


def _text(recipe: Recipe) -> str:
    from dataclasses import asdict

    return json.dumps(asdict(recipe), sort_keys=True)


def trajectories(nfes: tuple[int, ...], kept: Kept) -> Iterator[tuple[str, str, list[str]]]:
    """(mixture, solver, cells) of the table of exact errors; deterministic solvers only."""
    for mixture in MIXTURES:
        for name, overrides in VARIANTS:
            if name in STOCHASTIC or "model" in overrides:
                continue
            cells = []
            for nfe in nfes:
                error = mixture_error(mixture, overrides, nfe, kept)
                cells.append("–" if error is None else f"{error:.4f}")
            if any(cell != "–" for cell in cells):
                yield mixture, name, cells


def mixture_error(mixture: str, overrides: dict[str, Any], nfe: int, kept: Kept) -> float | None:
    """The exact error of a method on a mixture; None where it does not apply."""
    recipe = recipe_of(MIXTURES[mixture], overrides | {"dtype": "float64"}, nfe)
    if recipe is None:
        return None
    # Guidance doubles every evaluation; the column counts calls of the guided model.
    guided = mixture.endswith("guided")
    chosen = recipe.override({"guidance": {"name": "cfg", "scale": SCALES[mixture]}}) if guided else recipe
    return kept.get(f"{chosen.key}/trajectory", lambda: trajectory_error(chosen))


# --- overhead ---------------------------------------------------------------------------------------------------------


def overhead(repeats: int) -> list[Figure]:
    """Time of a solver's step outside the model, against a forward of digits and against the stock scheduler."""
    from diffusers import UniPCMultistepScheduler

    steps, shape = 20, (64, 1, 8, 8)
    model = load_model(base("digits"))
    process = model.process
    answer, x = torch.randn(shape), torch.randn(shape)
    labels = torch.zeros(64, dtype=torch.int64)

    class Canned:
        """Answers at once."""

        num_classes, shape = 10, (1, 8, 8)

        def __init__(self) -> None:
            self.process = process

        def denoise(self, x: torch.Tensor, t: float, cond: Any) -> torch.Tensor:
            return answer

    times = registry.times.build({"name": "uniform", "num_steps": steps})(process)
    sampler = Sampler(Canned(), registry.solvers.build(unified("unipc")), times)  # type: ignore[arg-type]
    noise = RowNoise(0, torch.arange(64))
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.016}
    ours, stock, forward = [], [], []
    with torch.no_grad():
        for _ in range(repeats):
            state = sampler.start(noise)
            began = time.perf_counter()
            for _ in range(steps):
                state = sampler.step(state, noise)
            ours.append((time.perf_counter() - began) / steps)
            scheduler = UniPCMultistepScheduler(**table, solver_order=3)
            scheduler.set_timesteps(steps)
            sample = x
            began = time.perf_counter()
            for n in scheduler.timesteps:
                sample = scheduler.step(answer, n, sample, return_dict=False)[0]
            stock.append((time.perf_counter() - began) / steps)
            began = time.perf_counter()
            model.denoise(x, 0.5, labels)
            forward.append(time.perf_counter() - began)
    step, other, whole = map(statistics.median, (ours, stock, forward))
    return [
        Figure("step_vs_forward", step / whole, "ratio", "lower", "<= 0.05"),
        Figure("step_vs_diffusers", step / other, "ratio", "lower", "<= 1"),
        Figure("step_us", 1e6 * step, "us", "lower"),
        Figure("forward_ms", 1e3 * whole, "ms", "lower"),
    ]


# --- what was published -----------------------------------------------------------------------------------------------


def published(kept: Kept, nfes: tuple[int, ...] = (5, 6, 8, 10)) -> list[Figure]:
    """Published behaviour as ratios of exact errors: below 1 is what the papers say."""

    def error(mixture: str, overrides: dict[str, Any], nfe: int) -> float:
        found = mixture_error(mixture, overrides, nfe, kept)
        assert found is not None
        return found

    def ratio(mixture: str, ours: dict[str, Any], others: list[dict[str, Any]], budgets: tuple[int, ...]) -> float:
        logs = [np.log(error(mixture, ours, n) / min(error(mixture, o, n) for o in others)) for n in budgets]
        return float(np.exp(np.mean(logs)))

    multistep = [{"solver": unified("dpmpp_2m")}, {"solver": unified("unipc")}]
    figures = []
    v3 = {"solver": {"name": "dpm_solver_v3", "max_order": 2}}
    dc = {"solver": hooked("unipc", name="compensation")}
    unipc = [{"solver": unified("unipc")}]
    low = tuple(n for n in nfes if n <= 6)
    for mixture in MIXTURES:
        tag = mixture.replace(" mixture", "").replace(", ", "_").replace(" ", "_")
        figures.append(Figure(f"v3_vs_best_{tag}", ratio(mixture, v3, multistep, nfes), "ratio", "lower", "< 1"))
        figures.append(Figure(f"dc_vs_unipc_{tag}", ratio(mixture, dc, unipc, low), "ratio", "lower", "< 1"))
    # Fourth-order multistep diverges here; second order with momentum does not.
    ghvb = {"solver": {"name": "ghvb", "max_order": 2, "beta": 0.8}}
    gain = ratio("64-D, guided", ghvb, [{"solver": unified("f_pndm")}], (5, 6, 8))
    figures.append(Figure("ghvb_vs_plms_guided", gain, "ratio", "lower", "< 1"))
    karras = {"name": "karras", "num_steps": 10}
    tele = {"solver": unified("dpmpp_2m"), "initial": "teleport", "times": karras}
    full = {"solver": unified("dpmpp_2m"), "times": karras}
    skipped = error("64-D digits mixture", tele, 17) / error("64-D digits mixture", full, 20)
    figures.append(Figure("teleport_17_vs_20", skipped, "ratio", "lower", "<= 1: 15 % of the evaluations skipped"))
    return figures


def main() -> None:
    """Measure what was asked for."""
    use_one_thread()
    args = arguments(
        __doc__ or "",
        ("--part", {"choices": ["quality", "trajectory", "overhead", "published"], "help": "measure only this"}),
        ("--model", {"choices": ["digits", "digits_flow"], "help": "distances of this model only"}),
        ("--samples", {"type": int, "default": 1024, "help": "samples of a distance (default 1024)"}),
        ("--keep", {"help": "file that keeps measured cells"}),
        ("--nfe", {"help": "budgets, for example 4,8,20; all of the table when left out"}),
        ("--only-kept", {"action": "store_true", "help": "print what the file has, measure nothing"}),
        ("--markdown", {"action": "store_true", "help": "print the tables as Markdown"}),
    )
    kept = Kept(args.keep, args.only_kept)
    nfes = (4, 8) if args.quick else NFES
    if args.nfe:
        nfes = tuple(int(n) for n in args.nfe.split(","))
    samples = 256 if args.quick else args.samples
    models = [args.model] if args.model else ["digits", "digits_flow"]
    figures: list[Figure] = []
    parts = [args.part] if args.part else ["overhead", "trajectory", "published", "quality"]
    tables: list[tuple[str, Iterator[tuple[str, str, list[str]]]]] = []
    if "overhead" in parts:
        figures += overhead(20 if args.quick else 200)
    if "trajectory" in parts:
        tables.append(("trajectory error", trajectories(nfes, kept)))
    if "quality" in parts:
        tables.append((f"Fréchet distance, {samples} samples, 95 % intervals", quality(models, samples, nfes, kept)))
    for title, rows in tables:
        before = ""
        for group, name, cells in rows:
            if group != before:
                _head(f"{group}: {title}", nfes, args.markdown)
                before = group
            print(f"| {name} | " + " | ".join(cells) + " |" if args.markdown else _row(name, cells), flush=True)
    if "published" in parts:
        figures += published(kept, (5, 8) if args.quick else (5, 6, 8, 10))
    print(f"\ncommit {commit()}")
    if figures:
        publish(figures, args.json)


def _head(title: str, nfes: tuple[int, ...], markdown: bool) -> None:
    if markdown:
        print(f"\n### {title}\n\n| solver | " + " | ".join(map(str, nfes)) + " |\n|---|" + "---|" * len(nfes))
    else:
        print(f"\n{title}\n" + _row("evaluations", [str(n) for n in nfes]))


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells)


if __name__ == "__main__":
    main()
