"""The point of a study that is exported: a recipe with its artifacts, and the solver that does the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """What is exported: a recipe with its artifacts in place.

    Attributes:
        recipe: the recipe.
        parts: its plug-ins, with artifacts.
        arrays: the artifacts by their place.
        solver: the spec of the unified solver that does the same; None for a stock scheduler.
        grid: the times, and the number of steps of a stock scheduler's own grid.
    """

    recipe: Any
    parts: Any
    arrays: dict[str, tuple[dict[str, Any], Any]]
    solver: dict[str, Any] | None
    grid: tuple[tuple[float, ...], int | None]

    @property
    def process(self) -> Any:
        """The noising process."""
        return self.parts.model.noising

    @property
    def schedule(self) -> Any:
        """What the solver does, as data; None for a stock scheduler."""
        from dataclasses import replace

        from tasks import registry

        if self.solver is None:
            return None
        found = registry.solvers.build(self.solver).schedule(self.process, self.grid[0])
        return replace(found, note=f"exported from recipe {self.recipe.key}")


def point(recipe: Any, root: str | None = None) -> Point:
    """The point that a recipe is, with the artifacts of its calibrations.

    Args:
        recipe: what to export.
        root: whose store may have the artifacts; they are made where it has not.

    Raises:
        ValueError: no diffusers scheduler can do what the recipe does.
    """
    from tasks import calibration
    from tasks.recipe import grid_of

    recipe.check()
    parts = recipe.parts
    if recipe.strategy["name"] != "single":
        raise ValueError(
            f"strategy {recipe.strategy['name']} runs several trajectories and chooses among them, which a scheduler "
            "cannot. Set strategy=single to export one of its trajectories."
        )
    if getattr(parts.times, "travels", False):
        raise ValueError(f"times {recipe.times['name']} jump back, which a scheduler cannot. Use another grid.")
    if recipe.guidance["name"] not in ("none", "cfg"):
        raise ValueError(
            f"guidance {recipe.guidance['name']} has no counterpart in a stock loop, so the export cannot be checked. "
            "Allowed: none, cfg."
        )
    if getattr(parts.guidance, "limited", False):
        raise ValueError(
            "guidance.sigma_low and sigma_high limit guidance to some noise levels, but a stock loop guides at every "
            "step. Set both to null."
        )
    if recipe.masks:
        raise ValueError(
            f"the schedule leaves out blocks of the network (skip={max(recipe.masks)}), which a stock scheduler "
            "cannot: it never sees the network. Set skip to 0 in every step."
        )
    if any(step.time_shift for step in getattr(parts.solver, "records", None) or ()):
        raise ValueError(
            "the schedule tells the network other times (time_shift), which a stock pipeline cannot: it tells it the "
            "grid's. Set time_shift to 0 in every step."
        )
    _unified(recipe, parts)  # refuses before anything is made
    arrays: dict[str, tuple[dict[str, Any], Any]] = {}
    for needed in recipe.calibrations:
        found = _artifact(recipe, needed, parts, root)
        arrays[needed.place] = (needed.meta, found)
        parts = calibration.bind(parts, needed.place, calibration.arrays_for(recipe, needed, found))
    return Point(recipe, parts, arrays, _unified(recipe, parts), grid_of(parts))


def _artifact(recipe: Any, needed: Any, parts: Any, root: str | None) -> Any:
    from safetensors.numpy import load_file

    from orchestrator.plan import ARTIFACTS
    from orchestrator.store import Store
    from tasks import calibration

    if needed.key.startswith("file:"):  # read and compared with the recipe when its key was made
        return load_file(dict(calibration.places(recipe.parts))[needed.place].artifact)
    try:
        stored = None if root is None else Store(root, create=False).get_arrays(ARTIFACTS, needed.key)
    except ValueError:  # no store there yet
        stored = None
    if stored is not None:
        return stored
    print(f"solvus: calibrating {needed.place}", file=sys.stderr, flush=True)
    return calibration.make(recipe, needed, parts)[0]


def _unified(recipe: Any, parts: Any) -> dict[str, Any] | None:
    """The spec of the unified solver that makes the recipe's steps; None for a stock scheduler.

    Raises:
        ValueError: its solver is none that a scheduler can carry.
    """
    from tasks.processes import EDM
    from tasks.scheduler import process_config, refuse_hook

    solver, name = recipe.solver, recipe.solver["name"]
    process_config(parts.model.noising)
    if name == "diffusers":
        if isinstance(parts.model.noising, EDM):
            raise ValueError(
                "stock EDM classes expect networks with a preconditioning of their own, which this model has not. Use "
                "solver=unified, which is exported as it is."
            )
        return None
    if name == "unified":
        hooks = []
        for spec, hook in zip(solver["hooks"], parts.solver.hook_objects, strict=True):
            ratios = getattr(hook, "calibrated", {}).get("ratios")
            if ratios is not None:  # found for exactly these steps
                spec = spec | {"ratios": [float(r) for r in ratios], "artifact": ""}
            elif spec["name"] != "compensation":  # whose ratios come with its artifact
                refuse_hook(hook)
            hooks.append(spec)
        return {key: value for key, value in solver.items() if value is not None} | {"hooks": hooks}
    same: dict[str, dict[str, Any]] = {
        "ddim": {"preset": "ddim", "eta": solver.get("eta") or None},
        "euler": {"preset": "ddim"},
        "rectified_flow": {"preset": "ddim"},
        "heun": {"preset": "heun", "leading": solver.get("leading_euler_steps") or None},
        "dpmpp_2m": {"preset": "dpmpp_2m", "lower_order_final": solver.get("lower_order_final") or None},
    }
    if name not in same:
        raise ValueError(
            f"solver {name} cannot be said as a diffusers scheduler. Allowed: "
            f"{', '.join([*same, 'unified', 'diffusers'])}."
        )
    return {"name": "unified"} | {key: value for key, value in same[name].items() if value is not None}
