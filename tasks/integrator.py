"""The loop body that runs any schedule: evaluate, correct the step before, predict.

The weights depend on the schedule and the process only, so they are computed once a run, in float64; a step is then a
few multiplications of tensors. Hooks (``tasks/hooks/``) may change what the network is told, what it answered, the
history or the direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
        self.times = schedule.times
        # At alpha = 0 the noise form is infinite; its first-order step is the one that all forms share.
        self.steps = tuple(
            replace(step, prediction="x0", variable="lam")
            if step.prediction == "eps" and step.order == 1 and not step.weights and process.alpha(t) == 0
            else step
            for step, t in zip(schedule.steps, schedule.times, strict=False)
        )
        sizes = [1] * len(self.steps) if sizes is None else sizes
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.groups = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.depth = deepest(self.steps)
        self.starts = [self._raised(t, step) for t, step in zip(self.times, self.steps, strict=False)]
        self.alpha = [process.alpha(t) for t in self.starts] + [process.alpha(self.times[-1])]
        self.sigma = [process.sigma(t) for t in self.starts] + [process.sigma(self.times[-1])]
        self.lam = [process.lam(t) for t in self.starts] + [process.lam(self.times[-1])]
        self.told = [self._told(i, step) for i, step in enumerate(self.steps)]
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

    def _told(self, i: int, step: Step) -> float:
        """The time that the network is told."""
        t = self.starts[i]
        return (
            min(max(t - step.time_shift * (t - self.times[i + 1]), self.process.t_min), 1.0) if step.time_shift else t
        )

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


def skipping(model: Any, step: Step) -> AbstractContextManager[Any]:
    """Within, the model runs without the blocks that the step leaves out."""
    return model.skipping(step.skip) if step.skip else nullcontext()


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
    state = churn(plan, i, state, noise, mark, s_noise)
    held = list(state.memory["hooks"])
    x0 = _evaluate(model, plan, i, state.x, state.memory["entries"], hooks, held)
    state = predict(plan, i, replace(state, memory=state.memory | {"hooks": tuple(held)}), x0, hooks)
    if is_corrected(plan, i):
        with skipping(model, plan.steps[i]):
            there = model.denoise(state.x, plan.times[i + 1])
        state = correct(plan, i, state, there)
    return finish(plan, i, state, noise, mark, hooks)


# --- the parts of step i, for those who evaluate the network themselves ----------------------------------------------
# In this order: ``churn``, an evaluation at ``plan.starts[i]`` (or ``unasked``), ``predict``, an evaluation at the end
# of the step and ``correct`` where ``is_corrected``, ``finish``.


def churn(plan: Plan, i: int, state: State, noise: Noise, mark: str = "", s_noise: float = 1.0) -> State:
    """The state that the network is to see: with fresh noise where the step raises it."""
    return replace(state, x=_churned(plan, i, state.x, noise, mark, s_noise)) if plan.steps[i].churn else state


def predict(plan: Plan, i: int, state: State, x0: Tensor, hooks: Sequence[Any] = ()) -> State:
    """The state at the end of the step, given the clean prediction at its start; the free corrector acts first."""
    step, memory, x = plan.steps[i], state.memory, state.x
    entries: tuple[Entry, ...] = memory["entries"]
    held = list(memory["hooks"])
    for j, hook in enumerate(hooks):
        if hasattr(hook, "settle"):
            x = hook.settle(plan, i, x, x0, held[j])
    fresh = Entry(x, x, x0, convert(step, x, x0, plan.alpha[i], plan.sigma[i]))
    before = plan.steps[i - 1] if i else step
    if i and before.corrector == "pseudo" and (correction := plan.corrections[i - 1]) is not None:
        end = fresh
        if before.prediction != step.prediction:
            end = replace(fresh, f=convert(before, x, x0, plan.alpha[i], plan.sigma[i]))
        x = _combine(correction, before, i - 1, plan, entries, end)
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
    return State(moved, x0, memory | {"entries": entries, "hooks": tuple(held)}, state.step)


def is_corrected(plan: Plan, i: int) -> bool:
    """Whether the step evaluates the network at its predicted end and is made again."""
    return plan.steps[i].corrector == "implicit" and plan.corrections[i] is not None


def correct(plan: Plan, i: int, state: State, there: Tensor) -> State:
    """The step made again with the clean prediction at its predicted end.

    That evaluation serves this correction only; the next step evaluates at the corrected end.
    """
    step, end, moved, correction = plan.steps[i], plan.times[i + 1], state.x, plan.corrections[i]
    assert correction is not None
    f = convert(step, moved, there, plan.process.alpha(end), plan.process.sigma(end))
    made = _combine(correction, step, i, plan, state.memory["entries"], Entry(moved, moved, there, f))
    return replace(state, x=made)


def finish(plan: Plan, i: int, state: State, noise: Noise, mark: str = "", hooks: Sequence[Any] = ()) -> State:
    """The end of the step: its fresh noise, and what hooks do there."""
    moved, held = state.x, list(state.memory["hooks"])
    std = plan.updates[i].std
    if std > 0:
        moved = moved + std * noise.normal(tuple(moved.shape[1:]), purpose=f"step{mark}")
    for j, hook in enumerate(hooks):
        if hasattr(hook, "land"):
            moved, held[j] = hook.land(plan, i, moved, state.memory["entries"], held[j])
    return replace(state, x=moved, memory=state.memory | {"hooks": tuple(held)})


def unasked(plan: Plan, i: int, x: Tensor, entries: Sequence[Entry]) -> Tensor | None:
    """The clean prediction of a step that does not call the network; None where it does."""
    step = plan.steps[i]
    if step.call == "noise":
        return torch.zeros_like(x)
    if step.call != "reuse":
        return None
    last = entries[0]
    if step.prediction == "x0":
        return last.x0
    eps = (last.seen - plan.alpha[i - 1] * last.x0) / plan.sigma[i - 1]
    return (x - plan.sigma[i] * eps) / plan.alpha[i]


def _churned(plan: Plan, i: int, x: Tensor, noise: Noise, mark: str, s_noise: float) -> Tensor:
    low, high, process = plan.times[i], plan.starts[i], plan.process
    ratio = process.alpha(high) / process.alpha(low)
    std = math.sqrt(max(process.sigma(high) ** 2 - (ratio * process.sigma(low)) ** 2, 0.0))
    return ratio * x + (s_noise * std) * noise.normal(tuple(x.shape[1:]), purpose=f"churn{mark}")


def _evaluate(
    model: Conditioned, plan: Plan, i: int, x: Tensor, entries: tuple[Entry, ...], hooks: Sequence[Any], held: list[Any]
) -> Tensor:
    given = unasked(plan, i, x, entries)
    if given is not None:
        return given
    t: float | Tensor = plan.told[i]
    for j, hook in enumerate(hooks):
        if hasattr(hook, "adapt_time"):
            t, held[j] = hook.adapt_time(plan, i, x, t, held[j])
    answering = next((j for j, hook in enumerate(hooks) if hasattr(hook, "answer")), None)
    with skipping(model, plan.steps[i]):
        if answering is None:
            x0 = model.denoise(x, t)
        else:
            x0, held[answering] = hooks[answering].answer(plan, i, model, x, t, held[answering])
    if plan.told[i] != plan.starts[i]:
        x0 = _at_own_time(plan, i, x, x0)
    for j, hook in enumerate(hooks):
        if hasattr(hook, "transform_output"):
            x0, held[j] = hook.transform_output(plan, i, x, x0, t, held[j])
    return x0


def _at_own_time(plan: Plan, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """The clean prediction at the step's own time that has the velocity of the one at the time the network was told.

    The velocity keeps its scale from pure noise to the data, where noise and clean predictions lose theirs; a process
    that has none (VE) keeps the noise.
    """
    told, alpha, sigma = plan.told[i], plan.alpha[i], plan.sigma[i]
    eps = (x - plan.process.alpha(told) * x0) / plan.process.sigma(told)
    if abs(alpha + sigma - 1.0) < 1e-9:
        return x - sigma * (eps - x0)
    if abs(alpha**2 + sigma**2 - 1.0) < 1e-9:
        return alpha * x - sigma * (plan.process.alpha(told) * eps - plan.process.sigma(told) * x0)
    return x - sigma * eps


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
