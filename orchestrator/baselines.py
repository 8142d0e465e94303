"""The best schedules that people know: what a search is started from and must beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.presets import PRESETS
from tasks.recipe import Recipe

GRIDS = ("uniform", "quadratic", "karras", "logsnr")
TOKEN_SOLVERS = ("ancestral", "first_hitting", "tau_leaping", "confidence", "remasking")


def stock(recipe: Recipe, nfes: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every deterministic preset with every stock grid at the given numbers of evaluations: (label, overrides).

    The uniform grid is what diffusers calls trailing spacing. What cannot run on the recipe's process, or is the same
    schedule again, is left out. Of a token model: every solver that needs neither energies nor a calibration, on the
    uniform grid.
    """
    if recipe.parts.model.noising.kind == "masked":
        yield from _stock_tokens(recipe, nfes)
        return
    seen = set()
    for nfe in nfes:
        for preset, settings in reversed(
            PRESETS.items()
        ):  # a strong schedule early stops the weak ones early in a race
            if settings.kappa or settings.eta or settings.churn:
                continue
            for grid in GRIDS:
                overrides = {"solver": {"name": "unified", "preset": preset}, "times": grid, "nfe": nfe}
                try:
                    found = recipe.override(overrides)
                    found.check()
                    schedule = found.parts.solver.schedule(found.parts.model.noising, found.grid[0])
                except ValueError:
                    continue
                key = (schedule.times, schedule.steps)
                if key not in seen:
                    seen.add(key)
                    yield f"{preset}, {grid}, {nfe}", overrides


def _stock_tokens(recipe: Recipe, nfes: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    for nfe in nfes:
        for solver in TOKEN_SOLVERS:
            overrides = {"solver": solver, "times": "uniform", "nfe": nfe}
            try:
                recipe.override(overrides).check()
            except ValueError:  # first hitting, with more steps than tokens
                continue
            yield f"{solver}, {nfe}", overrides


def listed(data: Any, recipe: Recipe, nfes: tuple[int, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The baselines of a search's spec: the word ``stock``, or a list of overrides (``label`` names one).

    Raises:
        ValueError: neither.
    """
    if data == "stock":
        return list(stock(recipe, nfes))
    found = []
    for i, point in enumerate(data):
        if not isinstance(point, Mapping):
            raise ValueError(f"search.baselines.{i} must map paths to values, got {point!r}. Or set baselines=stock.")
        overrides = {key: value for key, value in point.items() if key != "label"}
        found.append((str(point.get("label", f"baseline {i + 1}")), overrides))
    return found
