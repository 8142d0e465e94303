"""DC-Solver: dynamic compensation of the newest evaluation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from tasks import registry
from tasks.registry import hooks
from tasks.types import State


@hooks.register("compensation")
@dataclass(frozen=True)
class Compensation:
    """DC-Solver: the newest output becomes the interpolant of the last three at ``rho t_i + (1 - rho) t_{i-1}``.

    A predictor-corrector moves the state at t_i but keeps the output that was evaluated before the correction. The
    Lagrange interpolant of degree 2 in t through the last three outputs, read at a searched ratio rho_i (1 leaves the
    output, above 1 extrapolates), compensates for that. Ratios are found one step after the other on a few trajectories
    by a golden-section search on the error of the next state against a fine reference; a ratio that does not help on
    held-out trajectories stays 1.

    Args:
        ratios: rho of every step, instead of a search.
        num_samples: trajectories of the search.
        num_held_out: trajectories that a ratio has to help.
        num_reference: steps of the reference, at least.
        low: lower end of the search.
        high: upper end of the search.
        predict: take the ratios from the polynomial (CPR) fitted to searches at ``nfes`` and guidance ``scales``;
            refused outside their range. For settings that were not searched.
        nfes: evaluations of the runs searched for the polynomial.
        scales: their guidance scales; empty for the recipe's own.
        artifact: file with ratios found before.

    Reference: Zhao et al. 2024, "DC-Solver: Improving Predictor-Corrector Diffusion Sampler via Dynamic Compensation",
    eq. 9-12 and 14 (cascade polynomial regression). They descend the gradient through the network; the loss is smooth
    in one number, so a line search does without it.
    Cost: none when sampling; the search costs about 30 evaluations a step for each trajectory, and the reference.
    Identities: with all ratios 1 this is the solver without it.
    """

    ratios: tuple[float, ...] | None = None
    num_samples: int = 10
    num_held_out: int = 32
    num_reference: int = 200
    low: float = 0.3
    high: float = 2.5
    predict: bool = False
    nfes: tuple[int, ...] = (5, 6, 8, 10)
    scales: tuple[float, ...] = ()
    artifact: str = ""

    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_held_out < 0 or self.num_reference < 1 or not self.low <= 1 <= self.high:
            raise ValueError(
                "compensation needs num_samples >= 1, num_held_out >= 0, num_reference >= 1 and low <= 1 <= high, got "
                f"{self.num_samples}, {self.num_held_out}, {self.num_reference}, {self.low} and {self.high}."
            )

    @property
    def is_calibrated_here(self) -> bool:
        """Given ratios need no search."""
        return self.ratios is None

    @property
    def calibrated_on(self) -> tuple[str, ...]:
        """A search is for one grid and guidance; the polynomial serves all numbers of steps and guidance scales."""
        always = ("solver", "initial", "labels", "seed", "dtype", "times")
        return always if self.predict else (*always, "guidance")

    def calibration_part(self, part: str, value: Any) -> Any:
        """What of a part of the recipe the artifact depends on: the polynomial serves every length of one grid."""
        if self.predict and part == "times":
            return {k: v for k, v in value.items() if k != "num_steps"}
        return value

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        names = ["num_samples", "num_held_out", "num_reference", "low", "high", "predict"]
        return {name: getattr(self, name) for name in names + (["nfes", "scales"] if self.predict else [])}

    def check(self, plan: Any) -> None:
        """Refuse a schedule that it cannot compensate."""
        if any(step.kappa or step.churn for step in plan.steps):
            raise ValueError(
                "compensation is fitted on an ODE; this schedule draws noise. Set kappa, eta and churn to 0."
            )
        if self.ratios is not None and len(self.ratios) != len(plan.steps):
            raise ValueError(
                f"compensation.ratios must be {len(plan.steps)} numbers, one a step, got {len(self.ratios)}."
            )

    def begin(self, plan: Any) -> None:
        """Nothing."""
        return None

    def _ratio(self, plan: Any, i: int) -> float:
        if self.ratios is not None:
            return self.ratios[i]
        calibrated = getattr(self, "calibrated", None)
        if calibrated is None:
            return 1.0
        return float(calibrated["ratios"][i])

    def compensate(self, plan: Any, i: int, entries: Any, memory: Any) -> tuple[Any, Any]:
        """The history with its newest output replaced."""
        rho = self._ratio(plan, i)
        if rho == 1.0 or len(entries) < 3 or i < 2:
            return entries, memory
        nodes = [plan.starts[i], plan.starts[i - 1], plan.starts[i - 2]]
        at = rho * nodes[0] + (1.0 - rho) * nodes[1]
        weights = [
            float(np.prod([(at - nodes[k]) / (nodes[j] - nodes[k]) for k in range(3) if k != j])) for j in range(3)
        ]
        f = weights[0] * entries[0].f + weights[1] * entries[1].f + weights[2] * entries[2].f
        x0 = weights[0] * entries[0].x0 + weights[1] * entries[1].x0 + weights[2] * entries[2].x0
        return (replace(entries[0], f=f, x0=x0), *entries[1:]), memory

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The ratios of every step, or the coefficients of the polynomial evaluated at this recipe's setting."""
        if not self.predict:
            ratios = self._search(bench, bench.sampler(1).times, bench.parts.guidance)
            return {"ratios": ratios}
        guidance = bench.parts.guidance
        own = float(getattr(guidance, "scale", 1.0))
        points = []
        for nfe in self.nfes:
            fields, steps = bench.parts.solver.fit(nfe)
            grid = self._grid(bench, steps)
            for scale in self.scales or (own,):
                spec = bench.recipe.guidance | ({"scale": scale} if "scale" in bench.recipe.guidance else {})
                ratios = self._search(bench, grid, registry.guidance.build(spec))
                points += [(steps, scale, i, rho) for i, rho in enumerate(ratios)]
        return {"points": np.array(points)}

    def _grid(self, bench: Any, steps: int) -> tuple[float, ...]:
        times = registry.times.build(bench.recipe.times | {"num_steps": steps})
        return times(bench.process, bench.parts.initial.start(bench.process))

    def _search(self, bench: Any, times: tuple[float, ...], guidance: Any) -> np.ndarray:
        rows = self.num_samples + self.num_held_out
        model = guidance.wrap(bench.counted)
        sampler = replace(bench.sampler(rows, times=times), model=model)
        noise = bench.noise(rows)
        targets = _reference(bench, sampler, noise, self.num_reference)
        fitted = slice(0, self.num_samples)
        held = slice(self.num_samples, rows)
        solver = copy.copy(bench.parts.solver)
        place = next(i for i, hook in enumerate(solver.hook_objects) if hook == self)
        found = np.ones(sampler.num_steps)

        def step(state: State, ratio: float, i: int) -> State:
            trial = found.copy()
            trial[i] = ratio
            bound = copy.copy(self)
            object.__setattr__(bound, "calibrated", {"ratios": trial})
            hook_objects = [*solver.hook_objects]
            hook_objects[place] = bound
            solver.__dict__["hook_objects"] = tuple(hook_objects)
            return replace(sampler, solver=solver).step(state, noise)

        def errors(state: State, ratio: float, i: int) -> torch.Tensor:
            """Squared error of every row's next state, after the correction that the step after makes."""
            after = step(state, ratio, i)
            if i + 1 < sampler.num_steps:
                after = replace(after, x=_corrected(replace(sampler, solver=solver), after, noise, i + 1))
            return (after.x - targets[i + 1]).flatten(1).double().square().mean(1)

        state = sampler.start(noise)
        for i in range(sampler.num_steps):
            if i >= 2:
                here = state
                best = _golden(lambda r, s=here, k=i: float(errors(s, r, k)[fitted].mean()), self.low, self.high)
                new, old = errors(state, best, i), errors(state, 1.0, i)
                helps = bool(new[fitted].mean() < old[fitted].mean())
                if self.num_held_out:
                    helps = helps and bool(new[held].mean() < old[held].mean())
                found[i] = best if helps else 1.0
            state = step(state, found[i], i)
        return found

    def _setting(self, recipe: Any) -> tuple[int, float]:
        return recipe.parts.times.num_steps, float(getattr(recipe.parts.guidance, "scale", 1.0))

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a prediction outside what was searched.

        Raises:
            ValueError: names the range.
        """
        if not self.predict:
            return
        if "num_steps" not in recipe.times:
            raise ValueError(
                f"compensation predicts ratios for any number of steps, but times {recipe.times['name']} have one "
                "length. Use another grid, or set predict=false."
            )
        steps, scale = self._setting(recipe)
        counts = [recipe.parts.solver.fit(nfe)[1] for nfe in self.nfes]
        scales = self.scales or (scale,)
        if not min(counts) <= steps <= max(counts) or not min(scales) <= scale <= max(scales):
            raise ValueError(
                f"compensation cannot predict ratios for {steps} steps at guidance {scale:g}: it was searched for "
                f"{min(counts)} to {max(counts)} steps and guidance {min(scales):g} to {max(scales):g}. Widen nfes or "
                "scales, or set predict=false."
            )

    def arrays_for(self, recipe: Any, arrays: Any) -> dict[str, np.ndarray]:
        """The ratios of this recipe: those that were searched, or what the polynomial says."""
        if not self.predict:
            return dict(arrays)
        steps, scale = self._setting(recipe)
        return {"ratios": predicted_ratios(arrays["points"], steps, scale)}


def predicted_ratios(points: np.ndarray, num_steps: int, scale: float) -> np.ndarray:
    """Ratios from a least-squares polynomial: cubic in step / N, quadratic in N and in the guidance scale (CPR).

    Args:
        points: rows of (number of steps, scale, step, ratio).
        num_steps: N of the run.
        scale: its guidance scale.

    Degrees are lowered to what the number of searched settings determines. The first two ratios are 1 by construction.
    """
    points = points[points[:, 2] >= 2]
    of_steps = min(2, len(np.unique(points[:, 0])) - 1)
    of_scale = min(2, len(np.unique(points[:, 1])) - 1)

    def features(steps: np.ndarray, scales: np.ndarray, step: np.ndarray) -> np.ndarray:
        terms = [
            (steps / 50) ** a * (scales / 12) ** b * (step / steps) ** c
            for a in range(of_steps + 1)
            for b in range(of_scale + 1)
            for c in range(4)
        ]
        return np.stack(terms, axis=1)

    coefficients = np.linalg.lstsq(features(points[:, 0], points[:, 1], points[:, 2]), points[:, 3], rcond=None)[0]
    step = np.arange(num_steps, dtype=np.float64)
    found = features(np.full(num_steps, float(num_steps)), np.full(num_steps, scale), step) @ coefficients
    low, high = points[:, 3].min(), points[:, 3].max()
    return np.where(step < 2, 1.0, np.clip(found, low, high))


def _corrected(sampler: Any, state: State, noise: Any, i: int) -> torch.Tensor:
    """The state that step i starts from once its pseudo corrector has had its evaluation."""
    plan = state.memory["plan"]
    if plan.steps[i - 1].corrector != "pseudo" or plan.corrections[i - 1] is None:
        return state.x
    after = sampler.step(state, noise)
    return after.memory["entries"][0].x


def _reference(bench: Any, sampler: Any, noise: Any, num_steps: int) -> list[torch.Tensor]:
    """The states of a fine second-order run at every node of the grid."""
    parts = max(1, -(-num_steps // sampler.num_steps))
    grid = list(sampler.times)
    fine: list[float] = []
    for t, s in zip(grid, grid[1:], strict=False):
        fine += [t + (s - t) * k / parts for k in range(parts)]
    fine.append(grid[-1])
    solver = registry.solvers.build("dpmpp_2m")
    runner = replace(sampler, solver=solver, times=tuple(fine))
    state = runner.start(noise)
    found = [state.x]
    for k in range(runner.num_steps):
        state = runner.step(state, noise)
        if (k + 1) % parts == 0:
            found.append(state.x)
    return found


def _golden(function: Any, low: float, high: float, rounds: int = 14) -> float:
    """The minimiser of a smooth function of one number."""
    ratio = (5**0.5 - 1) / 2
    a, b = low, high
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    fc, fd = function(c), function(d)
    for _ in range(rounds):
        if fc < fd:
            b, d, fd = d, c, fc
            c = b - ratio * (b - a)
            fc = function(c)
        else:
            a, c, fc = c, d, fd
            d = a + ratio * (b - a)
            fd = function(d)
    return (a + b) / 2
