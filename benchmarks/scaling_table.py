"""Every strategy at equal cost, in one page: how large it is made, what is measured of it, and how that is written.

A strategy gets the largest size that a budget of network evaluations a sample pays for. Settings that are no size were
chosen on another seed than the one that is reported, at one budget (128) and on the reward's mean alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.search import Kept, carry_out, prepared
from orchestrator import measure
from orchestrator.store import Store
from tasks.intervals import Z95
from tasks.recipe import Recipe

SDE = {"name": "ddim", "eta": 1.0}
BUDGETS = (64, 128, 256)
MODELS = ("digits", "digits_flow")
STEPS = 8
STRENGTH = {"symmetry": 50.0, "ink": 120.0}  # inverse temperature of the strategies that sample a tilted law


@dataclass(frozen=True)
class Arm:
    """A way to spend the budget.

    Attributes:
        spec: the strategy's settings; a strength of None becomes that of the reward.
        size: the number that is raised until the budget is spent; a dotted path of the recipe.
        steps: of a trajectory, where ``size`` is another number.
        only: models that it runs on; empty is all.
    """

    spec: dict[str, Any]
    size: str
    steps: int = STEPS
    only: tuple[str, ...] = ()


def _of(name: str, size: str, **fields: Any) -> Arm:
    return Arm({"name": name, **fields}, f"strategy.{size}")


FLOW = ("digits_flow",)
ARMS: dict[str, Arm] = {
    "single": Arm({"name": "single"}, "times.num_steps"),
    "best_of_n": _of("best_of_n", "n"),
    "best_of_majority": _of("best_of_majority", "n", equivalence="classifier"),
    "pruned_best_of_n": _of("pruned_best_of_n", "n"),
    "adaptive_best_of_n": _of("adaptive_best_of_n", "max_n", cost=0.003, mean=-0.4, std=0.1),
    "noise_search": _of("noise_search", "candidates", rounds=3),
    "path_search": _of("path_search", "children", width=1),
    "beam": _of("beam", "children", width=2),
    "rollover": replace(_of("rollover", "max_nfe", chains=1), only=FLOW),
    "rollover, linear path": replace(_of("rollover", "max_nfe", chains=1, path="linear"), only=FLOW),
    "tree": _of("tree", "branching", prefix=2, depth=2),
    "tree_search": _of("tree_search", "max_nfe", strength=None),
    "tree_search, uct": _of("tree_search", "max_nfe", rule="uct", strength=None),
    "svdd": _of("svdd", "children", strength=None),
    "svdd, softmax": _of("svdd", "children", selection="softmax", strength=None),
    "fk_steering": _of("fk_steering", "particles", first=1, every=2, strength=None),
    "fk_steering, best": _of("fk_steering", "particles", first=1, every=2, strength=None, output="best"),
    "das": _of("das", "particles", gamma=0.09, strength=None),
    "das, best": _of("das", "particles", gamma=0.09, strength=None, output="best"),
    "fkc": _of("fkc", "particles", strength=None),
    "noise_gradient": _of("noise_gradient", "iterations", strength=10.0),
    "repulsion": _of("repulsion", "particles"),
    "minority": _of("minority", "n", draws=1),
    "variance_filter": _of("variance_filter", "n", threshold=0.0),
}
MEASURED: dict[str, Arm] = {
    "single": ARMS["single"],
    "best_of_n": ARMS["best_of_n"],
    "dps": Arm({"name": "dps", "zeta": 2.0}, "times.num_steps"),
    "afdps": replace(_of("afdps", "n"), steps=16),
    "active_sampling": replace(_of("active_sampling", "n", acquisitions=20, window=(0.0, 0.9)), steps=16),
}
SHORT = ("best_of_n", "noise_search", "beam", "rollover", "svdd", "fk_steering", "fk_steering, best", "das, best")
STEERED = ("beam", "svdd", "fk_steering", "fk_steering, best", "das", "das, best", "tree_search, uct", "rollover")


@dataclass(frozen=True)
class Block:
    """One reward, the strategies that are compared by it, and what is measured of their samples."""

    reward: dict[str, Any]
    arms: dict[str, Arm]
    values: tuple[str, ...]
    metrics: str
    title: str
    text: str
    more: dict[str, Any] = field(default_factory=dict)  # further fields of the recipe
    budgets: tuple[int, ...] = BUDGETS


QUALITIES = ("quality/class_accuracy", "quality/frechet", "quality/diversity")
BLOCKS = {
    "symmetry": Block(
        {"name": "symmetry"}, ARMS, ("reward/symmetry", *QUALITIES),
        "[{name: mean_reward, reward: symmetry}, class_accuracy, frechet, diversity]", "Symmetry",
        "The reward is the left-right symmetry of the image: few digits have it, so more can be had at every budget.",
    ),
    "ink": Block(
        {"name": "ink"}, {name: ARMS[name] for name in SHORT}, ("reward/ink", *QUALITIES),
        "[{name: mean_reward, reward: ink}, class_accuracy, frechet, diversity]", "Ink",
        "A second reward, the mean intensity, for the strategies that the comparison is about.", budgets=BUDGETS[:2],
    ),
    "measurement": Block(
        {"name": "measurement", "operator": "blur", "sigma_y": 0.1}, MEASURED,
        ("reward/recovery_psnr", "reward/measurement", "quality/frechet", "quality/diversity"),
        "[{name: mean_reward, reward: recovery_psnr}, {name: mean_reward, reward: {name: measurement, operator: blur, "
        "sigma_y: 0.1}}, frechet, diversity]",
        "A measurement",
        "Strategies that need a measurement, on one: every digit blurred, with noise of 0.1, no labels. `dps` and\n"
        "`active_sampling` pay a backward pass for every evaluation besides; `active_sampling` sees 20 of the 64\n"
        "entries. PSNR is against the clean digit, in dB.",
        {"labels": None}, BUDGETS[:2],
    ),
}  # fmt: skip


def base(model: str, batch_size: int = 128, block: str = "symmetry") -> Recipe:
    """A stochastic sampler of eight steps and the reward of a block."""
    grid = {"name": "quadratic" if model == "digits" else "uniform", "num_steps": STEPS}
    fields: dict[str, Any] = {"model": model, "solver": SDE, "times": grid, "guidance": "none", "strategy": "single"}
    found = BLOCKS[block]
    return Recipe(**fields, **found.more, reward=found.reward, batch_size=batch_size).completed()


def fitted(model: str, name: str, budget: int, block: str = "symmetry") -> Recipe:
    """The strategy at the size that spends most of the budget.

    Raises:
        ValueError: it cannot run on this model, or no size fits.
    """
    arm = BLOCKS[block].arms[name]
    if arm.only and model not in arm.only:
        raise ValueError(f"needs a flow model ({', '.join(arm.only)}).")
    spec = {key: STRENGTH.get(block) if key == "strength" and v is None else v for key, v in arm.spec.items()}
    begun = base(model, block=block).override(
        {"times.num_steps": arm.steps, "strategy": {**spec, "budget": {"nfe": budget}}}
    )
    found, reason, beyond = None, "", 0
    for number in range(1, budget + 1):
        try:
            made = begun.override({arm.size: number})
            made.check()
        except ValueError as error:
            reason, beyond = reason or str(error), beyond + 1
            if found is not None and beyond > 3:
                break
            continue
        if found is None or made.nfe > found.nfe:  # one that adapts spends less where its last round does not fit
            found, beyond = made, 0
    if found is None:
        raise ValueError(reason)
    return found


# --- cells ------------------------------------------------------------------------------------------------------------


def cells(kept: Kept, blocks: Iterable[str], only: str | None, budgets: tuple[int, ...], samples: int) -> None:
    """Measure what the folder lacks, cheapest budget first, and first what is compared."""
    for budget in budgets:
        for compared in (True, False):
            for block in blocks:
                names = [n for n in BLOCKS[block].arms if (n in SHORT) == compared and only in (None, n)]
                for model in MODELS if budget in BLOCKS[block].budgets else ():
                    for name in names:
                        key = {"block": block, "model": model, "budget": budget, "strategy": name, "samples": samples}
                        if kept.find(**key) is None:
                            print(kept.add(key | cell(kept.folder, block, model, budget, name, samples)), flush=True)


def cell(root: Path, block: str, model: str, budget: int, name: str, samples: int) -> dict[str, Any]:
    """Values and errors of one strategy, with what a sample really cost; or why it cannot run."""
    try:
        recipe = fitted(model, name, budget, block)
    except ValueError as error:
        return {"refused": str(error)}
    title = f"{block}-{model}-{name}-{budget}".replace(", ", "-").replace(" ", "-")
    metrics = f"metrics={BLOCKS[block].metrics}"
    study = prepared(root, f"model={model}", metrics, f"num_samples={samples}", f"name={title}")
    (trial,) = carry_out(replace(study, recipe=recipe))
    if trial.state != "complete":
        return {"refused": trial.reason}
    semantics = getattr(recipe.parts.strategy, "semantics", "sample")
    errors = {f"se/{value}": error for value, error in trial.errors.items()}
    return {"setting": recipe.strategy, "semantics": semantics, "seconds": trial.seconds} | trial.values | errors


# --- the page ---------------------------------------------------------------------------------------------------------

COSTS = {"evaluations": "cost/nfe", "reward calls": "cost/reward_calls", "decodes": "cost/decodes"}


def page(kept: Kept) -> str:
    """The cells as Markdown."""
    every = kept.all()
    counts = ", ".join(str(n) for n in sorted({c["samples"] for c in every}))
    lines = [
        "# Strategies at equal cost",
        "",
        "Written by `python -m benchmarks.scaling --part table --keep DIR`. Each strategy at the largest size that a",
        "budget of network evaluations a sample pays for, eight steps a trajectory (`single` and `dps` take them all",
        "as steps, `afdps` and `active_sampling` sixteen). Evaluations, reward and decoder calls are what a sample",
        "really cost; where they differ, the budget is equal and the spending is not. Seconds are a sample's, on a",
        f"busy core. {counts} samples a cell, intervals of 95 %, the same sample indices in every cell.",
        "",
        "`best` in the second column is an optimiser, whose samples are of no tilted law. `sample` draws from one,",
        "with the bias of so few particles. Most strategies maximise the reward of the first value: the others were",
        "not selected for. Diversity is the mean squared distance of two samples over that of two items of the data.",
        "The Fréchet distance of so few samples is biased upwards: compare it within this page only. The strength",
        "of symmetry, 50, lies between values tried on another seed (30, 60, 100 and 300; `digits`, 64 evaluations);",
        "that of ink was not tried.",
    ]
    for name, block in BLOCKS.items():
        mine = [c for c in every if c["block"] == name]
        if mine:
            lines += ["", f"## {block.title}", "", block.text]
            for budget in sorted({c["budget"] for c in mine}):
                for model in MODELS:
                    lines += _table(f"{model}, {budget} evaluations", block, mine, model, budget)
            lines += _differences(kept, name, mine)
    return "\n".join(lines) + "\n"


def _table(title: str, block: Block, mine: list[dict[str, Any]], model: str, budget: int) -> list[str]:
    heads = ["strategy", "gives", *COSTS, "seconds", *(value.split("/")[1] for value in block.values)]
    lines = ["", f"### {block.title}: {title}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    here = [c for c in mine if (c["model"], c["budget"]) == (model, budget)]
    here.sort(key=lambda c: list(block.arms).index(c["strategy"]))
    for c in [c for c in here if "refused" not in c]:
        spent = [f"{c[key]:.4g}" for key in COSTS.values()] + [f"{c['seconds']:.2g}"]
        found = [f"{c[v]:.3g} ± {Z95 * c[f'se/{v}']:.2g}" if v in c else "–" for v in block.values]
        lines.append("| " + " | ".join([c["strategy"], c["semantics"], *spent, *found]) + " |")
    left = [f"- {c['strategy']} is left out: {c['refused']}" for c in here if "refused" in c]
    return lines + ["", *left] if left else lines


def _differences(kept: Kept, block: str, mine: list[dict[str, Any]]) -> list[str]:
    """Steering less best of n, and rollover less particles, on the same sample indices."""
    value, models = BLOCKS[block].values[0], MODELS
    pairs = [(name, "best_of_n") for name in STEERED if name in BLOCKS[block].arms]
    pairs += [("rollover", other) for other in ("fk_steering", "fk_steering, best") if other in BLOCKS[block].arms]
    budgets = sorted({c["budget"] for c in mine})
    body = []
    for model in models:
        for first, second in pairs:
            found = [_difference(kept, block, model, budget, first, second, mine) for budget in budgets]
            if any(found):
                body.append(f"| {model} | {first} - {second} | " + " | ".join(f or "–" for f in found) + " |")
    if not body:
        return []
    heads = ["model", f"difference of {value.split('/')[1]}", *(f"{budget} evaluations" for budget in budgets)]
    text = "Row by row, at equal budgets; an interval without 0 is a difference."
    return ["", f"### {BLOCKS[block].title}: who is better", "", text, "", "| " + " | ".join(heads) + " |",
            "|---" * len(heads) + "|", *body]  # fmt: skip


@cache
def _effects(root: Path, block: str, model: str, budget: int, name: str, samples: int) -> Any:
    reward = BLOCKS[block].values[0].split("/")[1]
    metric = {"name": "mean_reward", "reward": reward}
    recipe = fitted(model, name, budget, block)
    return measure.influences(recipe, metric, f"reward/{reward}", 0, samples, Store(str(root)))


def _difference(
    kept: Kept, block: str, model: str, budget: int, first: str, second: str, mine: list[dict[str, Any]]
) -> str:
    sizes = [
        {c["samples"] for c in mine if (c["model"], c["budget"], c["strategy"]) == (model, budget, n) and value_in(c)}
        for n in (first, second)
    ]
    both = sizes[0] & sizes[1]
    if not both:
        return ""
    effects = [_effects(kept.folder, block, model, budget, name, max(both)) for name in (first, second)]
    value, error = measure.paired_difference(*effects)
    return f"{value:+.3g} ± {Z95 * error:.2g}"


def value_in(c: dict[str, Any]) -> bool:
    """Whether a cell was measured."""
    return "refused" not in c
