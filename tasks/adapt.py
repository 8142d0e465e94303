"""Schedules made to fit: the nearest that can run; onto another process; to another cost; in plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tasks import integrator
from tasks.coefficients import angle, highest_order, is_usable
from tasks.integrator import Plan
from tasks.processes import to_x0
from tasks.schedule import SolverSchedule, Step, check_step, evaluations
from tasks.types import State


def possible(process: Any, times: Sequence[float], wanted: Sequence[Step]) -> SolverSchedule:
    """The schedule that takes these steps as far as they are possible.

    An order without history, an expansion at an infinite log-SNR, a corrector that nothing follows or that starts at
    alpha = 0, fresh noise in the velocity form: each becomes the nearest that exists.

    Args:
        process: the noising process.
        times: N + 1 decreasing times.
        wanted: N steps.
    """
    steps: list[Step] = []
    for i, step in enumerate(wanted):
        steps.append(_possible(process, times, step, i, last=i == len(wanted) - 1))
    return SolverSchedule(tuple(times), tuple(steps))


def _possible(process: Any, times: Sequence[float], step: Step, i: int, last: bool) -> Step:
    if step.weights:
        return step
    t, end = times[i], times[i + 1]
    variable, kappa, corrector = step.variable, step.kappa, "none" if last else step.corrector
    if step.prediction == "v":
        variable, kappa = variable if variable in ("u", "t", "index") else "u", 0.0
    elif variable == "u":
        variable = "t"
    if kappa > 0 or (step.prediction != "v" and process.alpha(t) == 0):
        corrector = "none"
    plain = replace(
        step, order=1, start=1, points=None, scale=(), variable=variable, kappa=kappa, corrector=corrector,
        relax=step.relax if variable == "lam" else "none",
    )  # fmt: skip
    order = min(step.order, i + 1)
    if order > 1 and highest_order(process, replace(plain, order=order), t, end) == 1:
        plain = replace(plain, variable="t", relax="none", kappa=0.0)  # log-SNR has no end at the data; time has
        if highest_order(process, replace(plain, order=order), t, end) == 1:
            order = 1
    usable = 0
    while usable < i and is_usable(process, plain.variable, times[i - 1 - usable]):
        usable += 1
    order = min(order, usable + 1)
    if order == 1:
        return plain
    points = step.points[: order - 1] if step.points is not None and step.start == 1 else None
    if points is not None and any(-o > i for group in points for o in group):
        points = None
    return replace(plain, order=order, points=points, scale=step.scale[: order - 1])


def moved(schedule: SolverSchedule, source: Any, target: Any) -> SolverSchedule:
    """The same schedule on another process: every node goes to where the target has the same log-SNR.

    The ends stay at pure noise and at the data; nodes beyond the target's range of log-SNR are spread within it.

    Raises:
        ValueError: weights of its steps belong to its own process.
    """
    if source == target:
        return schedule
    _refuse_weights(schedule, "process")
    times = [schedule.times[0]]
    count = len(schedule.steps)
    for i, t in enumerate(schedule.times[1:-1], 1):
        node = float(target.time(source.lam(t)))
        times.append(min(max(node, 2 * target.t_min * (count - i)), times[-1] * 0.999))
    found = possible(target, (*times, schedule.times[-1]), schedule.steps)
    return replace(found, note=schedule.note)


def resampled(schedule: SolverSchedule, nfe: int, process: Any) -> SolverSchedule:
    """The schedule at another number of evaluations.

    Nodes are read from the curve of nodes over the fraction of steps done, the choices of a step from the step that
    covers the same fraction; the last step stays the last. Implicit correctors are taken away until the cost fits.

    Raises:
        ValueError: no such schedule spends that many evaluations, or weights of its steps belong to its own nodes.
    """
    if nfe == schedule.nfe:
        return schedule
    _refuse_weights(schedule, "number of evaluations")
    count = len(schedule.steps)
    for num_steps in range(1, nfe + 2):
        times, steps = [schedule.times[0]], []
        for i in range(num_steps):
            place = (i + 1) / num_steps * count
            left = min(int(place), count - 1)
            low, high = schedule.times[left], schedule.times[left + 1]
            times.append(schedule.times[-1] if i == num_steps - 1 else low + (place - left) * (high - low))
            steps.append(schedule.steps[-1 if i == num_steps - 1 else min(int(i / num_steps * count), count - 1)])
        found = possible(process, times, steps)
        spare = found.nfe - nfe
        for i, step in enumerate(found.steps):
            if spare > 0 and step.corrector == "implicit":
                spare -= 1
                found = replace(found, steps=(*found.steps[:i], replace(step, corrector="none"), *found.steps[i + 1 :]))
        if found.nfe == nfe:
            return replace(found, note=schedule.note)
    raise ValueError(f"a schedule of {schedule.nfe} evaluations cannot be made to spend {nfe}. Choose another number.")


def shortened(schedule: SolverSchedule, first: int) -> SolverSchedule:
    """The schedule from step ``first`` on, begun without history: orders rise from 1 again."""
    steps: list[Step] = []
    rest = schedule.steps[first:]
    for j, step in enumerate(rest):
        try:
            check_step(j, len(rest), step)
        except ValueError:
            if step.weights:
                raise ValueError(
                    f"step {first + j} has weights of what came before step {first}, so a run cannot begin there. "
                    "Begin at the first step (strength 1), or use a schedule without weights."
                ) from None
            order = min(step.order, j + 1)
            step = replace(step, order=order, start=1, points=None, scale=step.scale[: order - 1])
        steps.append(step)
    return SolverSchedule(schedule.times[first:], tuple(steps), schedule.note)


def _refuse_weights(schedule: SolverSchedule, what: str) -> None:
    if any(step.weights for step in schedule.steps):
        raise ValueError(
            f"the schedule's steps have free weights, which hold for its own nodes alone: it has no form for another "
            f"{what}. Use it as it is, or search one without weights (space=velocity)."
        )


def weighted(process: Any, schedule: SolverSchedule, prediction: str) -> SolverSchedule:
    """The same schedule with every step as weights of the first state and of all predictions so far.

    The states of an explicit deterministic schedule are sums of its first state and of its predictions, whatever it
    expands in what; the sums are found by running it on vectors of their coefficients.

    Args:
        process: the noising process.
        schedule: evaluates the network once a step.
        prediction: of the new steps.

    Raises:
        ValueError: fresh noise, a step that evaluates twice or not at all, or a prediction that the process lacks.
    """
    if prediction == "v":
        angle(process, schedule.times[0])  # refuses a process that has no such form
    if prediction == "eps" and process.alpha(schedule.times[0]) == 0:
        raise ValueError(
            "a noise prediction says nothing where alpha is 0, and this schedule begins there. Use v or x0."
        )
    if schedule.stochastic or any(evaluations(step) != 1 or step.call != "model" for step in schedule.steps):
        raise ValueError("only a deterministic schedule that evaluates the network once a step can be said in weights.")
    plain = replace(schedule, steps=tuple(replace(step, time_shift=0.0, skip=0) for step in schedule.steps))
    plan = Plan(process, plain)
    count = len(schedule.steps)
    state = State(torch.eye(count + 1, dtype=torch.float64)[:1], None, integrator.start(plan))
    flows = process.kind_of_path == "linear"
    kind = {"x0": "sample", "eps": "epsilon", "v": "flow" if flows else "v_prediction"}[prediction]
    steps: list[Step] = []
    for i, step in enumerate(schedule.steps):
        f = torch.eye(count + 1, dtype=torch.float64)[i + 1 : i + 2]
        state = integrator.predict(plan, i, state, to_x0(kind, state.x, f, plan.alpha[i], plan.sigma[i]))
        steps.append(
            Step(
                prediction=prediction, variable="u" if prediction == "v" else "lam", start=i + 1,
                weights=tuple(state.x[0, : i + 2].tolist()), time_shift=step.time_shift, skip=step.skip,
            )
        )  # fmt: skip
    return replace(schedule, steps=tuple(steps))
