"""What inference-time scaling costs and buys: overhead, batched particles, and every strategy at equal cost.

    python -m benchmarks.scaling [--part overhead|particles|actor|table] [--keep DIR] [--only NAME] [--quick] [--json]

strategy_overhead          largest share of a strategy's time outside model and reward, over the strategies that step
                           particles, on digits
batched_particles_speedup  time of 16 particles in sixteen calls a step over that in one call, same samples, digits
reward_actor_ratio         rows a second with the reward in a Ray actor of its own over rows a second in process

``--part table`` measures every strategy on digits and digits_flow at 64, 128 and 256 evaluations a sample, and writes
docs/scaling_table.md from the cells that ``--keep DIR`` holds. It takes hours and can be stopped and continued. The
reward is the symmetry of the image, which is also what most strategies maximise: read the other columns too.
``--quick`` measures one small cell of each strategy, and writes no page.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import ROOT, Figure, arguments, commit, publish
from benchmarks.search import Kept, carry_out, prepared
from tasks.recipe import Recipe
from tasks.run import generate, load_model, use_one_thread
from tasks.sampler import CountedModel, CountedReward

PARTS = ("overhead", "particles", "actor", "table")
SDE = {"name": "ddim", "eta": 1.0}
BUDGETS = (64, 128, 256)
STEPS = 8
# Strategy -> (its other settings, the number that is raised until the budget is spent). One evaluation a step.
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "best_of_n": ({}, "n"),
    "pruned_best_of_n": ({}, "n"),
    "adaptive_best_of_n": ({"cost": 0.01, "std": 1.0}, "max_n"),
    "noise_search": ({"rounds": 3}, "candidates"),
    "path_search": ({"width": 1}, "children"),
    "beam": ({"width": 2}, "children"),
    "rollover": ({"chains": 1}, "max_nfe"),
    "tree": ({"prefix": 4, "depth": 2}, "branching"),
    "tree_search": ({"strength": 10.0}, "max_nfe"),
    "svdd": ({}, "children"),
    "fk_steering": ({"first": 1, "every": 2}, "particles"),
    "das": ({}, "particles"),
    "fkc": ({"strength": 10.0}, "particles"),
    "noise_gradient": ({}, "iterations"),
    "repulsion": ({}, "particles"),
    "minority": ({"draws": 1}, "n"),
    "variance_filter": ({"threshold": 0.0}, "n"),
}


def base(model: str, batch_size: int = 256) -> Recipe:
    """A stochastic sampler of so many steps, with a reward that few samples satisfy by themselves."""
    grid = {"name": "quadratic" if model == "digits" else "uniform", "num_steps": STEPS}
    fields: dict[str, Any] = {"model": model, "solver": SDE, "times": grid, "guidance": "none", "strategy": "single"}
    return Recipe(**fields, reward={"name": "symmetry"}, batch_size=batch_size).completed()


def fitted(model: str, name: str, budget: int) -> Recipe:
    """The strategy at the size that spends most of the budget.

    Raises:
        ValueError: it cannot run on this model, or no size fits.
    """
    if name == "single":
        made = base(model).override({"times.num_steps": budget})
        made.check()
        return made
    more, size = ARMS[name]
    found, reason = None, ""
    for number in range(1, budget + 1):
        spec = {"name": name, **more, size: number, "budget": {"nfe": budget}}
        try:
            made = base(model).override({"strategy": spec})
            made.check()
        except ValueError as error:
            reason = reason or str(error)
            continue
        if found is None or made.nfe > found.nfe:  # one that adapts spends less where its last round does not fit
            found = made
    if found is None:
        raise ValueError(reason)
    return found


# --- overhead ---------------------------------------------------------------------------------------------------------


def own_share(recipe: Recipe, rows: int) -> float:
    """Share of the time of making rows that is spent neither in the model nor in the reward."""
    inside, depth = [0.0], [0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            depth[0] += 1
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    inside[0] += time.perf_counter() - began

        return call

    with (
        mock.patch.object(CountedModel, "_call", timed(CountedModel._call)),
        mock.patch.object(CountedReward, "__call__", timed(CountedReward.__call__)),
    ):
        began = time.perf_counter()
        generate(recipe, 0, rows)
        return 1.0 - inside[0] / (time.perf_counter() - began)


def overhead(quick: bool) -> list[Figure]:
    """Strategies whose steps are all forward; a gradient's backward pass is no call that could be timed here."""
    shares = {}
    for name in ("best_of_n", "pruned_best_of_n", "noise_search", "beam", "svdd", "fk_steering"):
        recipe = fitted("digits", name, 64)
        load_model(recipe)
        rows = 16 if quick else 64
        shares[name] = statistics.median(own_share(recipe, rows) for _ in range(1 if quick else 3))
        print(f"{name}: {shares[name]:.1%} outside of model and reward", flush=True)
    return [Figure("strategy_overhead", max(shares.values()), "share", "lower", "<= 0.05")]


def particles(quick: bool) -> list[Figure]:
    """The same 16 candidates of every row, in one call of the network a step and in sixteen."""
    import numpy as np

    count, rows = 16, 1
    together = base("digits", rows).override({"strategy": {"name": "best_of_n", "n": count}})
    load_model(together)
    seconds: dict[int, list[float]] = {count: [], 1: []}
    original = CountedModel.__init__
    for attempt in range(3 if quick else 15):
        made = {}
        for width in (count, 1) if attempt % 2 else (1, count):

            def narrow(self: Any, model: Any, max_rows: int, width: int = width) -> None:
                original(self, model, width)

            with mock.patch.object(CountedModel, "__init__", narrow):
                began = time.perf_counter()
                made[width] = generate(together, attempt, attempt + rows)["x0"]
                seconds[width].append(time.perf_counter() - began)
        np.testing.assert_allclose(made[1], made[count], atol=1e-4)
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[count])
    return [Figure("batched_particles_speedup", ratio, "ratio", "higher", ">= 1.5")]


def actor(quick: bool) -> list[Figure]:
    """Rows a second through the actor over in process; the rows are compared too."""
    import numpy as np

    from orchestrator.adapters.ray_executor import RayExecutor
    from orchestrator.adapters.ray_rewards import ServedReward

    recipe = fitted("digits", "fk_steering", 64)
    assert recipe.reward is not None
    count = 32 if quick else 128
    pool = RayExecutor(workers=1, cpus=0.0, reward_actor={"num_cpus": 1}).start()
    try:

        def served(spec: Any, texts: tuple[str, ...]) -> Any:
            return ServedReward(spec, texts, {"num_cpus": 0})

        ratios = []
        for attempt in range(3 if quick else 9):
            low = attempt * count  # fresh rows: nothing that the actor remembers
            made, seconds = {}, {}
            for place, how in (
                (("here", None), ("there", served)) if attempt % 2 else (("there", served), ("here", None))
            ):
                began = time.perf_counter()
                made[place] = generate(recipe, low, low + count, served=how)["x0"]
                seconds[place] = time.perf_counter() - began
            ratios.append(seconds["here"] / seconds["there"])
            assert np.array_equal(made["here"], made["there"])
    finally:
        pool.close()
    return [Figure("reward_actor_ratio", statistics.median(ratios[1:]), "ratio", "higher", ">= 0.9")]


# --- the table --------------------------------------------------------------------------------------------------------

VALUES = ("reward/symmetry", "quality/class_accuracy", "quality/frechet", "quality/diversity")


def cells(kept: Kept, names: list[str], budgets: tuple[int, ...], samples: int, models: tuple[str, ...]) -> None:
    """Measure what the folder lacks."""
    for model in models:
        for budget in budgets:
            for name in names:
                key = {"model": model, "budget": budget, "strategy": name, "samples": samples}
                if kept.find(**key) is None:
                    kept.add(key | cell(kept.folder, model, budget, name, samples))
                    print(kept.all()[-1], flush=True)


def cell(root: Path, model: str, budget: int, name: str, samples: int) -> dict[str, Any]:
    """Values and errors of one strategy, with what a sample really cost; or why it cannot run."""
    try:
        recipe = fitted(model, name, budget)
    except ValueError as error:
        return {"refused": str(error)}
    metrics = "metrics=[{name: mean_reward, reward: symmetry}, class_accuracy, frechet, diversity]"
    study = prepared(root, f"model={model}", metrics, f"num_samples={samples}", f"name={model}-{name}-{budget}")
    (trial,) = carry_out(replace(study, recipe=recipe))
    if trial.state != "complete":
        return {"refused": trial.reason}
    errors = {f"se/{value}": error for value, error in trial.errors.items()}
    return {"setting": recipe.strategy, "seconds": trial.seconds} | trial.values | errors


def page(kept: Kept) -> str:
    """The cells as Markdown."""
    lines = [
        "# Strategies at equal cost",
        "",
        "Written by `python -m benchmarks.scaling --part table --keep DIR`. Each strategy at the largest size that the",
        "budget of network evaluations a sample pays for, eight steps a trajectory (`single` takes them all as steps);",
        "95 % intervals. Most strategies maximise the reward of the first column: the others were not selected for.",
        "Diversity is the mean squared distance of two samples over that of two items of the data.",
    ]
    for model, budget in sorted({(c["model"], c["budget"]) for c in kept.all()}):
        lines += ["", f"## {model}, {budget} evaluations a sample", ""]
        heads = ["strategy", "evaluations", "reward calls", "decodes", "seconds", *VALUES]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for c in [c for c in kept.all() if (c["model"], c["budget"]) == (model, budget)]:
            if "refused" in c:
                continue
            spent = [f"{c[f'cost/{n}']:.4g}" for n in ("nfe", "reward_calls", "decodes")] + [f"{c['seconds']:.2g}"]
            found = [f"{c[v]:.4g} ± {1.96 * c[f'se/{v}']:.2g}" if v in c else "–" for v in VALUES]
            lines.append("| " + " | ".join([c["strategy"], *spent, *found]) + " |")
        lines += [
            f"\n{c['strategy']} left out: {c['refused']}"
            for c in kept.all()
            if (c["model"], c["budget"]) == (model, budget) and "refused" in c
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for."""
    use_one_thread()
    args = arguments(
        __doc__ or "",
        ("--part", {"choices": PARTS, "help": "measure only this (the table only when asked for)"}),
        ("--only", {"choices": ["single", *ARMS], "help": "only this strategy's cells"}),
        ("--keep", {"help": "folder that keeps studies and cells"}),
    )
    parts = [args.part] if args.part else list(PARTS[:-1])
    found: list[Figure] = []
    for part, measured in (("overhead", overhead), ("particles", particles), ("actor", actor)):
        if part in parts:
            found += measured(args.quick)
    if "table" in parts:
        kept = Kept(Path(args.keep or tempfile.mkdtemp(prefix="solvus-scaling-")), False)
        names = [args.only] if args.only else ["single", *ARMS]
        if args.quick:
            cells(kept, names, (64,), 80, ("digits_flow",))
            print(page(kept))
        else:
            cells(kept, names, BUDGETS, 256, ("digits", "digits_flow"))
            (ROOT / "docs" / "scaling_table.md").write_text(page(kept) + f"\nCommit {commit()}.\n")
        found.append(Figure("cells", len(kept.all()), "cells", "higher"))
    publish(found, args.json)


if __name__ == "__main__":
    main()
