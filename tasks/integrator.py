"""The loop body that runs any schedule: evaluate, correct the step before, predict.

The weights depend on the schedule and the process only, so they are computed once a run, in float64; a step is then a
few multiplications of tensors. Hooks (``tasks/hooks/``) may change what the network is told, what it answered, the
history or the direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tasks.coefficients import END, Update, rho, update
from tasks.schedule import SolverSchedule, Step, check_step, deepest
from tasks.types import Conditioned, Noise, State


@dataclass(frozen=True)
class Entry:
    """One evaluation that a run remembers.

    Attributes:
        x: the state there, corrected if the step that led to it was; where a singlestep block restarts.
        seen: the state that the network saw.
        x0: its clean prediction there.
        f: the prediction in the form that the latest step used.
    """

    x: Tensor
    seen: Tensor
    x0: Tensor
    f: Tensor


class Plan:
    """A schedule on a process with all its numbers: what a run looks up and never changes.

    Args:
        process: the noising process.
        schedule: what to do.
        sizes: how many steps of the schedule each step of the grid is; one each when left out.

    Raises:
        ValueError: the schedule cannot run on this process.
    """

    def __init__(self, process: Any, schedule: SolverSchedule, sizes: Sequence[int] | None = None) -> None:
        self.process, self.schedule = process, schedule
        self.steps, self.times = schedule.steps, schedule.times
        sizes = [1] * len(self.steps) if sizes is None else sizes
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.groups = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.depth = deepest(self.steps)
        self.starts = [self._raised(t, step) for t, step in zip(self.times, self.steps, strict=False)]
        self.alpha = [process.alpha(t) for t in self.starts] + [process.alpha(self.times[-1])]
        self.sigma = [process.sigma(t) for t in self.starts] + [process.sigma(self.times[-1])]
        self.lam = [process.lam(t) for t in self.starts] + [process.lam(self.times[-1])]
        self.updates: list[Update] = []
        self.corrections: list[Update | None] = []
        for i, step in enumerate(self.steps):
            check_step(i, len(self.steps), step)
            base = i - step.start + 1
            spots = {j - base: self.starts[j] for j in range(max(0, i - self.depth), i + 1)}
            self.updates.append(_finite(update(process, step, spots, self.times[i + 1]), i, step))
            corrected = None
            if step.corrector != "none" and process.sigma(self.times[i + 1]) > 0:
                corrected = _finite(update(process, step, spots, self.times[i + 1], correcting=True), i, step)
            self.corrections.append(corrected)

    def _raised(self, t: float, step: Step) -> float:
        """The time whose noise level is (1 + churn) times that of t, at most 1."""
        if not step.churn:
            return t
        return min(1.0, self.process.time(-math.log(rho(self.process, t) * (1.0 + step.churn))))

    def reindex(self, index: Tensor) -> Plan:
        """The same for other particles."""
        return self


def _finite(found: Update, i: int, step: Step) -> Update:
    if not all(math.isfinite(v) for v in (found.carry, found.std, *(w for _, w in found.weights))):
        raise ValueError(
            f"step {i} ({step}) has infinite weights here: its form cannot start at alpha = 0 or end at sigma = 0. Use "
            "order 1 there, or another prediction or variable."
        )
    return found


def start(plan: Plan, hooks: Sequence[Any] = ()) -> dict[str, Any]:
    """The memory before the first step."""
    begun = tuple(hook.begin(plan) if hasattr(hook, "begin") else None for hook in hooks)
    return {"plan": plan, "entries": (), "hooks": begun, "group": 0}


def convert(step: Step, x: Tensor, x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """A clean prediction in the form that a step expands."""
    if step.prediction == "x0":
        return x0
    eps = (x - alpha * x0) / sigma
    if step.prediction == "eps":
        return eps
    # The velocity of a flow is eps - x0; along the angle of a VP process it is alpha eps - sigma x0.
    return eps - x0 if abs(alpha + sigma - 1.0) < 1e-9 else alpha * eps - sigma * x0


def run_group(model: Conditioned, state: State, noise: Noise, hooks: Sequence[Any] = (), s_noise: float = 1.0) -> State:
    """All steps of the schedule that the next step of the grid stands for."""
    plan, group = state.memory["plan"], state.memory["group"]
    for place, i in enumerate(plan.groups[group]):
        state = _one(model, state, plan, i, noise, f"-{place}" if place else "", hooks, s_noise)
    return State(state.x, state.x0_hat, state.memory | {"group": group + 1}, state.step + 1)


def _one(
    model: Conditioned, state: State, plan: Plan, i: int, noise: Noise, mark: str, hooks: Sequence[Any], s_noise: float
) -> State:
    step, memory, x = plan.steps[i], state.memory, state.x
    entries: tuple[Entry, ...] = memory["entries"]
    held = list(memory["hooks"])
    shape = tuple(x.shape[1:])
    if step.churn:
        x = _churned(plan, i, x, noise, mark, s_noise)
    x0 = _evaluate(model, plan, i, x, entries, hooks, held)
    for j, hook in enumerate(hooks):
        if hasattr(hook, "settle"):
            x = hook.settle(plan, i, x, x0, held[j])
    fresh = Entry(x, x, x0, convert(step, x, x0, plan.alpha[i], plan.sigma[i]))
    before = plan.steps[i - 1] if i else step
    if i and before.corrector == "pseudo" and (correction := plan.corrections[i - 1]) is not None:
        x = _combine(correction, before, i - 1, plan, entries, fresh)
        fresh = replace(fresh, x=x)
    entries = (fresh, *entries[: plan.depth - 1])
    if i and (before.prediction != step.prediction):
        entries = (fresh, *(_as(step, entry, plan, i - 1 - j) for j, entry in enumerate(entries[1:])))
    for j, hook in enumerate(hooks):
        if hasattr(hook, "compensate"):
            entries, held[j] = hook.compensate(plan, i, entries, held[j])
    found = plan.updates[i]
    if any(hasattr(hook, "direction") for hook in hooks):
        moved = _directed(found, step, i, plan, entries, hooks, held)
    else:
        moved = _combine(found, step, i, plan, entries, None)
    if step.corrector == "implicit" and (correction := plan.corrections[i]) is not None:
        # The evaluation at the predicted end serves this correction only; the next step evaluates at the corrected one.
        end = plan.times[i + 1]
        there = model.denoise(moved, end)
        f = convert(step, moved, there, plan.process.alpha(end), plan.process.sigma(end))
        moved = _combine(correction, step, i, plan, entries, Entry(moved, moved, there, f))
    if found.std > 0:
        moved = moved + found.std * noise.normal(shape, purpose=f"step{mark}")
    for j, hook in enumerate(hooks):
        if hasattr(hook, "land"):
            moved, held[j] = hook.land(plan, i, moved, entries, held[j])
    return State(moved, x0, memory | {"entries": entries, "hooks": tuple(held)}, state.step)


def _churned(plan: Plan, i: int, x: Tensor, noise: Noise, mark: str, s_noise: float) -> Tensor:
    low, high, process = plan.times[i], plan.starts[i], plan.process
    ratio = process.alpha(high) / process.alpha(low)
    std = math.sqrt(max(process.sigma(high) ** 2 - (ratio * process.sigma(low)) ** 2, 0.0))
    return ratio * x + (s_noise * std) * noise.normal(tuple(x.shape[1:]), purpose=f"churn{mark}")


def _evaluate(
    model: Conditioned, plan: Plan, i: int, x: Tensor, entries: tuple[Entry, ...], hooks: Sequence[Any], held: list[Any]
) -> Tensor:
    step = plan.steps[i]
    if step.call == "noise":
        return torch.zeros_like(x)
    if step.call == "reuse":
        last = entries[0]
        if step.prediction == "x0":
            return last.x0
        eps = (last.seen - plan.alpha[i - 1] * last.x0) / plan.sigma[i - 1]
        return (x - plan.sigma[i] * eps) / plan.alpha[i]
    t: float | Tensor = plan.starts[i]
    for j, hook in enumerate(hooks):
        if hasattr(hook, "adapt_time"):
            t, held[j] = hook.adapt_time(plan, i, x, t, held[j])
    x0 = model.denoise(x, t)
    for j, hook in enumerate(hooks):
        if hasattr(hook, "transform_output"):
            x0, held[j] = hook.transform_output(plan, i, x, x0, t, held[j])
    return x0


def _as(step: Step, entry: Entry, plan: Plan, i: int) -> Entry:
    """An older evaluation in the form of a new step."""
    return replace(entry, f=convert(step, entry.seen, entry.x0, plan.alpha[i], plan.sigma[i]))


def _combine(found: Update, step: Step, i: int, plan: Plan, entries: tuple[Entry, ...], end: Entry | None) -> Tensor:
    """``carry x_b + sum_j w_j f_j``; ``entries[0]`` is evaluation i, ``end`` the one at the step's end."""
    back = step.start - 1
    x = found.carry * entries[back].x
    for offset, weight in found.weights:
        entry = end if offset == END else entries[back - offset]
        assert entry is not None
        x = torch.add(x, entry.f, alpha=weight)
    return x


def _directed(
    found: Update, step: Step, i: int, plan: Plan, entries: tuple[Entry, ...], hooks: Sequence[Any], held: list[Any]
) -> Tensor:
    """The same with the direction, the weighted mean of the predictions, given to the hooks first."""
    back = step.start - 1
    u = sum(entries[back - offset].f * (weight / found.total) for offset, weight in found.weights)
    for j, hook in enumerate(hooks):
        if hasattr(hook, "direction"):
            u, held[j] = hook.direction(plan, i, u, entries, held[j])
    return found.carry * entries[back].x + found.total * u
