"""What inference-time scaling costs and buys: overhead, batched particles, and every strategy at equal cost.

    python -m benchmarks.scaling [--part overhead|particles|actor|table] [--keep DIR] [--only NAME] [--quick] [--json]

strategy_overhead          largest share of a strategy's time outside model and reward, over the strategies that step
                           particles, on digits
batched_particles_speedup  time of 16 particles in sixteen calls a step over that in one call, same samples, digits
reward_actor_ratio         rows a second with the reward in a Ray actor of its own over rows a second in process

``--part table`` measures every strategy on digits and digits_flow at 64, 128 and 256 evaluations a sample, and writes
docs/scaling_table.md from the cells that ``--keep DIR`` holds (``scaling_table.py`` says what is compared). It takes
the better part of an hour and can be stopped and continued. ``--quick`` measures a few small cells, and writes no page.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import ROOT, Figure, arguments, commit, publish
from benchmarks.scaling_table import ARMS, BLOCKS, BUDGETS, MEASURED, base, cells, fitted, page
from benchmarks.search import Kept
from tasks.recipe import Recipe
from tasks.run import generate, load_model, use_one_thread
from tasks.sampler import CountedModel, CountedReward

PARTS = ("overhead", "particles", "actor", "table")


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
    count = 32 if quick else 512
    pool = RayExecutor(workers=1, cpus=0.0, reward_actor={"num_cpus": 1}).start()
    try:

        def served(spec: Any, texts: tuple[str, ...]) -> Any:
            return ServedReward(spec, texts, {"num_cpus": 0})

        ratios = []
        for attempt in range(3 if quick else 5):
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


def main() -> None:
    """Measure what was asked for."""
    use_one_thread()
    args = arguments(
        __doc__ or "",
        ("--part", {"choices": PARTS, "help": "measure only this (the table only when asked for)"}),
        ("--only", {"choices": [*ARMS, *MEASURED], "help": "only this strategy's cells"}),
        ("--only-kept", {"action": "store_true", "help": "write the page from the cells that are there"}),
        ("--samples", {"type": int, "default": 128, "help": "samples of a cell of the table"}),
        ("--keep", {"help": "folder that keeps studies and cells"}),
    )
    parts = [args.part] if args.part else list(PARTS[:-1])
    found: list[Figure] = []
    for part, measured in (("overhead", overhead), ("particles", particles), ("actor", actor)):
        if part in parts:
            found += measured(args.quick)
    if "table" in parts:
        kept = Kept(Path(args.keep or tempfile.mkdtemp(prefix="solvus-scaling-")), False)
        if args.quick:
            cells(kept, ["ink"], args.only, (64,), 80)
            print(page(kept))
        else:
            cells(kept, list(BLOCKS) if not args.only_kept else [], args.only, BUDGETS, args.samples)
            (ROOT / "docs" / "scaling_table.md").write_text(page(kept) + f"\nCommit {commit()}.\n")
        found.append(Figure("cells", len(kept.all()), "cells", "higher"))
    publish(found, args.json)


if __name__ == "__main__":
    main()
