"""What a recipe cannot be: parts that do not belong together, refused before any work starts."""

from __future__ import annotations

import math
from typing import Any

from tasks import account, calibration, registry
from tasks.recipe import Recipe, segments
from tasks.types import sample_shape

_GIVES = {
    "posterior_mean": "posterior mean",
    "flow_end": "trajectory's end (a consistency model)",
    "flow_map": "flow map",
    "energy_log_prob": "log-probability of whole strings",
}


def check(recipe: Recipe) -> None:
    """Refuse what cannot run, before any work starts.

    Raises:
        ValueError: says what is wrong, what is allowed and what to do.
    """
    p, solver = recipe.parts, recipe.solver["name"]
    process = p.model.noising
    if p.solver.process != process.kind:
        fitting = [n for n in registry.solvers.names() if _process(n) == process.kind]
        raise ValueError(
            f"solver {solver} steps {p.solver.process} processes, but model {recipe.model['name']} is "
            f"{process.kind}. Choose one of: {', '.join(fitting)}."
        )
    _check_pairings(recipe)
    if hasattr(p.model, "check_recipe"):
        p.model.check_recipe(recipe)
    grid, stock_steps = recipe.grid
    travels = getattr(p.times, "travels", False)
    if stock_steps is None and not travels and not all(a > b for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"times must decrease, got {list(grid)}. Use fewer steps or another grid.")
    if min(grid) < 0 or max(grid) > 1:
        raise ValueError(f"times must lie in [0, 1], got {list(grid)}.")
    start = p.initial.start(process)
    begins_elsewhere = recipe.initial["name"] != "prior" and not math.isclose(grid[0], start, rel_tol=1e-9)
    if stock_steps is None and begins_elsewhere:
        raise ValueError(
            f"the grid begins at t={grid[0]:.6g}, but initial {recipe.initial['name']} begins at {start:.6g}. "
            "Let the first time be that one, or use a grid that is laid from it, such as times=uniform."
        )
    if stock_steps is not None and start != 1.0:
        raise ValueError(
            f"a stock scheduler's own grid begins at pure noise, but initial {recipe.initial['name']} begins at "
            f"t={start:.4g}. Use another grid than times=stock."
        )
    if hasattr(p.solver, "check"):
        for first, last in segments(grid) if stock_steps is None else [(0, 0)]:
            p.solver.check(process, stock_steps if stock_steps is not None else grid[first : last + 1])
    for name, number in (("batch_size", recipe.batch_size), ("seed", recipe.seed)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{name} must be a whole number, got {number!r}.")
    if recipe.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {recipe.batch_size}.")
    if not 0 <= recipe.seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2^63 - 1, got {recipe.seed}.")
    if recipe.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {recipe.dtype!r}.")
    if recipe.device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {recipe.device!r}.")
    _check_labels(recipe)
    if p.strategy.uses_reward:
        if p.reward is None:
            raise ValueError(f"strategy {recipe.strategy['name']} needs a reward. Set reward=NAME.")
        p.reward.check(sample_shape(p.model))
        if hasattr(p.reward, "check_model"):
            p.reward.check_model(p.model)
        if p.reward.needs_labels and not recipe.has_labels:
            raise ValueError(f"reward {recipe.reward['name']} needs labels, but this study has none.")  # type: ignore[index]
        if hasattr(p.reward, "at") and not getattr(p.reward, "by_prompt", False) and recipe.has_labels:
            raise ValueError(
                f"reward {recipe.reward['name']} measures item i in row i, whose label asks for another class. Set "  # type: ignore[index]
                "labels=null."
            )
    _check_strategy(recipe)
    if p.strategy.branches and not p.solver.stochastic:
        instead = "solver=ancestral" if p.model.noising.kind == "masked" else "solver=ddim solver.eta=1"
        raise ValueError(
            f"strategy {recipe.strategy['name']} copies particles, but {solver} is deterministic: copies would stay "
            f"identical. Use a stochastic solver, for example {instead}."
        )
    if p.strategy.branches and getattr(p.solver, "window", None) is not None:
        raise ValueError(
            f"strategy {recipe.strategy['name']} copies particles, and copies stay identical in the steps of "
            f"{solver} outside solver.window={list(p.solver.window)}: it needs every step to be stochastic. Set "
            "solver.window=null."
        )
    adaptive = recipe.solver["name"] if getattr(p.solver, "adaptive", False) else ""
    account.check_budget(recipe.strategy["name"], p.strategy.budget, recipe.account, adaptive)


def _check_pairings(recipe: Recipe) -> None:
    """Refuse a model, solver, times or initial state that do not belong together."""
    p, process = recipe.parts, recipe.parts.model.noising
    studied = [("times", p.times, "uniform")] if hasattr(p.times, "calibrate") else []
    studied += [("initial", p.initial, "prior")] if recipe.initial["name"] not in ("prior", "shared_noise") else []
    for kind, plugin, instead in studied:
        if getattr(plugin, "process", "gaussian") != process.kind:
            raise ValueError(
                f"{kind} {plugin.name} is made for {getattr(plugin, 'process', 'gaussian')} processes, but model "
                f"{recipe.model['name']} is {process.kind}. Use {kind}={instead}."
            )
    needed, given = getattr(p.solver, "needs", "posterior_mean"), getattr(p.model, "gives", ("posterior_mean",))
    if needed not in given:
        fitting = [n for n in registry.solvers.names() if _needs(n) in given and _process(n) == process.kind]
        raise ValueError(
            f"solver {recipe.solver['name']} needs a model that gives its {_GIVES[needed]}, but model "
            f"{recipe.model['name']} gives {' and '.join(_GIVES[g] for g in given)}. Solvers that fit: "
            f"{', '.join(fitting)}."
        )
    if needed != "posterior_mean" and "flow_map" in given and recipe.guidance["name"] != "none":
        raise ValueError(
            f"guidance {recipe.guidance['name']} cannot guide the exact flow map that solver {recipe.solver['name']} "
            "uses. Use guidance=none, or a model that was distilled with guidance."
        )
    noisy = [f"solver {recipe.solver['name']}"] if p.solver.stochastic else []
    noisy += [f"times {recipe.times['name']}"] if getattr(p.times, "travels", False) else []
    noisy += [f"initial {recipe.initial['name']}"] if recipe.initial["name"] not in ("prior", "shared_noise") else []
    if not getattr(process, "stochastic_ok", True) and noisy:
        raise ValueError(
            f"{type(process).__name__} is sampled by its ODE from its own prior alone, but {noisy[0]} draws "
            "Gaussian noise. Choose a deterministic solver and initial=prior."
        )
    if getattr(p.times, "travels", False) and not getattr(p.solver, "restarts", True):
        raise ValueError(
            f"times {recipe.times['name']} jump back, but solver {recipe.solver['name']} lays its own course. "
            "Use one of Solvus's solvers."
        )
    _check_skip(recipe)
    _check_interval(recipe)
    for _, plugin in calibration.places(p):
        if hasattr(plugin, "check_recipe"):
            plugin.check_recipe(recipe)


def _check_skip(recipe: Recipe) -> None:
    """Refuse steps that leave out blocks which the network does not have."""
    if not recipe.masks:
        return
    model = f"model {recipe.model['name']}"
    if getattr(recipe.parts.model, "blocks", None) is None:
        raise ValueError(
            f"the schedule leaves out blocks of the network (skip={max(recipe.masks)}), but {model} has none. "
            "Set skip to 0, or use a model that is a network, such as digits."
        )
    for mask in recipe.masks:
        recipe.parts.model.blocks.check(mask, model)
    if recipe.strategy["name"] not in ("single", "best_of_n"):  # others evaluate the network outside of the steps
        raise ValueError(
            f"the schedule leaves out blocks of the network, which strategy {recipe.strategy['name']} cannot. Use "
            "strategy=single or best_of_n."
        )


def _check_interval(recipe: Recipe) -> None:
    """Refuse guidance whose cost differs from step to step where that could not be planned."""
    if not recipe.is_limited:
        return
    p = recipe.parts
    obstacles = (
        (p.model.noising.kind != "gaussian", f"model {recipe.model['name']} has no noise levels sigma / alpha"),
        (recipe.has_calibrated_times, f"times {recipe.times['name']} are not known before their calibration"),
        (calibration.needs_calibration(p.solver), f"solver {recipe.solver['name']} needs a calibration first"),
        (p.initial.evaluations > 0, f"initial {recipe.initial['name']} evaluates the network at levels of its own"),
    )
    for stands, why in obstacles:
        if stands:
            raise ValueError(
                f"guidance {recipe.guidance['name']} costs more at some noise levels than at others, but {why}, so "
                "its cost cannot be planned. Guide every level alike, or use another one."
            )


def _check_strategy(recipe: Recipe) -> None:
    """Refuse a strategy that the other parts cannot serve."""
    p = recipe.parts
    if getattr(p.strategy, "intermediate", False) and not getattr(p.reward, "scores_predictions", True):
        raise ValueError(
            f"strategy {recipe.strategy['name']} judges unfinished samples (as predicted or as they are), but reward "
            f"{recipe.reward['name'] if recipe.reward else None} cannot score these. Use another reward, or "
            "strategy=best_of_n."
        )
    if hasattr(p.strategy, "check_recipe"):
        p.strategy.check_recipe(recipe)


def _check_labels(recipe: Recipe) -> None:
    classes = recipe.parts.model.num_classes
    if isinstance(recipe.labels, bool) or not (recipe.labels in (None, "cycle") or isinstance(recipe.labels, int)):
        raise ValueError(f"labels must be cycle, null or a number, got {recipe.labels!r}.")
    if isinstance(recipe.labels, int) and not 0 <= recipe.labels < max(classes, 1):
        raise ValueError(f"labels must be below the model's {classes} classes, got {recipe.labels}.")
    if getattr(recipe.parts.model, "needs_labels", False) and not recipe.has_labels:
        raise ValueError(f"model {recipe.model['name']} needs a label for every row. Set labels=cycle.")
    if recipe.parts.guidance.needs_labels and getattr(recipe.parts.model, "needs_labels", False):
        raise ValueError(
            f"model {recipe.model['name']} has no unconditional prediction, so guidance {recipe.guidance['name']} "
            "cannot be used. Use guidance=none."
        )
    if recipe.parts.guidance.needs_labels and not recipe.has_labels:
        raise ValueError(
            f"guidance {recipe.guidance['name']} needs labels, but "
            + ("labels is null." if classes else f"model {recipe.model['name']} has none.")
            + " Use guidance=none."
        )


def _needs(solver: str) -> str:
    return getattr(registry.solvers.get(solver), "needs", "posterior_mean")


def _process(solver: str) -> str:
    """The kind of process that a registered solver can step."""
    cls: Any = registry.solvers.get(solver)
    return cls.process
