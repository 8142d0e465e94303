"""Classifier-free guidance with a scale for every step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.branches import unconditional
from tasks.processes import expand
from tasks.registry import guidance
from tasks.types import Model


@guidance.register("cfg_schedule")
@dataclass(frozen=True)
class ScheduledCFG:
    """Classifier-free guidance with its own scale at every step of the grid: ``x0 = x0_u + w_i (x0_c - x0_u)``.

    With as many scales as steps, step i has scale i. With another number they are knots at equal distances over the
    steps, and scales between them are interpolated, so one list serves all numbers of steps. All evaluations of a step
    have that step's scale; a strategy that asks outside of the steps gets that of the step in which its time lies. A
    search ranges over ``guidance.scales.0``, ``guidance.scales.1``, ….

    Args:
        scales: scales from noise to data. Where one is exactly 1, the unconditional branch is left out; where it is
            exactly 0, the conditional one.

    Reference: Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers", eq. 4 (weights that depend on
        time); Kynkäänniemi et al. 2024 (limited interval, the schedule of ones and w).
    Cost: two network evaluations per call, one where the scale is 1 or 0.
    Identities: equal scales are ``cfg``; all at 1 are the conditional model, all at 0 the unconditional one.
    """

    scales: tuple[float, ...] = (1.0, 2.0, 2.0, 1.0)

    evaluations = 2
    needs_labels = True
    asks_unlabelled = True
    follows_grid = True

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("guidance.scales must be at least one number, got none. Give one for every step.")

    @property
    def limited(self) -> bool:
        """Whether steps may differ in cost."""
        return any(scale in (0.0, 1.0) for scale in self.scales)

    def check_recipe(self, recipe: Any) -> None:
        """Refuse grids and strategies in which a time does not say which step it belongs to.

        Raises:
            ValueError: times that rise, a solver that chooses its own, or a model without noise levels.
        """
        parts = recipe.parts
        obstacles = (
            (getattr(parts.times, "travels", False), f"times {recipe.times['name']} come back to the same level"),
            (getattr(parts.solver, "adaptive", False), f"solver {recipe.solver['name']} chooses its own steps"),
        )
        for stands, why in obstacles:
            if stands:
                raise ValueError(f"guidance cfg_schedule has a scale for every step, but {why}. Use guidance=cfg.")

    def on_grid(self, steps: int) -> tuple[float, ...]:
        """The scale of each of some number of steps."""
        if len(self.scales) == steps:
            return self.scales
        places = np.linspace(0.0, 1.0, steps) if steps > 1 else np.array([0.5])
        return tuple(np.interp(places, np.linspace(0.0, 1.0, len(self.scales)), self.scales).tolist())

    def wrap(self, model: Model) -> Model:
        """The guided model, which is told its grid by the sampler."""
        return _Guided(model, self, None)


class _Guided:
    def __init__(
        self, model: Model, spec: ScheduledCFG, times: tuple[float, ...] | None, step: int | None = None
    ) -> None:
        self._model, self._spec, self._step = model, spec, step
        if times is not None:
            self._negative = [-t for t in times]
            self._scales = spec.on_grid(len(times) - 1)
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def on_grid(self, times: tuple[float, ...]) -> _Guided:
        """The same on a grid."""
        return _Guided(self._model, self._spec, times)

    def at_step(self, step: int) -> _Guided:
        """The same within one step."""
        return _Guided(self._model, self._spec, self._times, step)

    def _scale(self, t: float) -> float:
        if self._times is None:
            raise ValueError("guidance cfg_schedule has a scale for every step, so it needs a grid. Use guidance=cfg.")
        if self._step is not None:
            return self._scales[self._step]
        step = bisect_right(self._negative, -t) - 1  # the step that t begins or lies in
        return self._scales[min(max(step, 0), len(self._scales) - 1)]

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        nothing = unconditional(self._model, cond, "cfg_schedule")
        several = isinstance(t, Tensor) and t.ndim > 0
        scales = [self._scale(float(s)) for s in t] if several else [self._scale(float(t))]  # type: ignore[union-attr]
        for one, labels in ((1.0, cond), (0.0, nothing)):
            if all(scale == one for scale in scales):
                return self._model.denoise(x, t, labels)
        without = self._model.denoise(x, t, nothing)
        conditional = self._model.denoise(x, t, cond)
        weight = expand(torch.tensor(scales, device=x.device), x) if several else scales[0]
        return without + weight * (conditional - without)
