"""SolverSchedule: which update is made at every step of a run, as plain data.

One grammar holds most training-free solvers. Every step evaluates the network once (an implicit corrector twice) and
moves from ``t`` to the next time ``s`` by

    x_s = A x_b + sum_d c_d D_d + std z

where b is the step's base (the current state, or an earlier one in a singlestep block), c_d the exact integral of the
d-th Taylor term of the chosen prediction in the chosen variable against the linear part of the equation, and D_d the
estimate of the d-th derivative from the evaluations in ``points``. ``tasks/coefficients.py`` has the formulas.

Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (USF).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tasks.registry import coerce, unknown

PREDICTIONS = ("x0", "eps", "v")
VARIABLES = ("lam", "rho", "t", "u", "index")
RELAXATIONS = ("none", "bh1", "bh2")
CORRECTORS = ("none", "pseudo", "implicit")
CALLS = ("model", "noise", "reuse")
MAX_ORDER = 6
MAX_BLOCKS = 62  # bits of ``Step.skip``: a mask has to fit a signed 64-bit number


@dataclass(frozen=True)
class Step:
    """One step of a schedule.

    Attributes:
        order: Taylor order p; p - 1 derivatives are estimated.
        prediction: what is expanded: ``x0`` (data), ``eps`` (noise), ``v`` (velocity, along ``u``).
        variable: in what it is expanded: ``lam`` (half log-SNR), ``rho`` (sigma / alpha), ``t``, ``u`` (the angle of a
            VP process, the time of a flow), or ``index`` (equal spacing whatever the grid: classical Adams-Bashforth
            weights).
        start: 1 continues from the last state (multistep); k restarts from the state of k - 1 evaluations ago and uses
            what was evaluated since (the end of a singlestep block of k evaluations).
        points: for every derivative the evaluations that estimate it, counted from the base: -1 is the one before, +1
            the one after. Left out, all of the p - 1 nearest are used for each, which gives full order.
        scale: factor on each derivative's term; 1 where left out.
        relax: factor 1 + O(h) on the term of a derivative that one point estimates: ``bh1`` (h^2 / 2 over its exact
            value), ``bh2`` (h (e^h - 1) / 2; the midpoint rule of DPM-Solver-2 and DPM-Solver++ 2M).
        corrector: ``pseudo`` makes the step again once the network was evaluated at its end, with that output as one
            more point (UniC; free); ``implicit`` does so and evaluates again (predict, evaluate, correct, evaluate; one
            more).
        kappa: how stochastic: 0 is the ODE, 1 the reverse SDE.
        churn: raises sigma / alpha by this fraction with fresh noise before the step (EDM).
        call: ``model`` evaluates the network; ``noise`` takes eps = x / sigma instead (the analytical first step);
            ``reuse`` takes the last prediction again. The last two cost nothing.
        skip: bit mask of the network's blocks that the step's evaluations leave out (``tasks/layer_skip.py``).
        time_shift: the network is told ``t - time_shift (t - s)`` instead of t, between -0.5 and 0.5; its answer is
            taken as a velocity, and that is kept at t (Tong et al. 2024, "Learning to Discretize Denoising Diffusion
            ODEs", decoupled times).
        weights: the whole step as plain numbers instead of an expansion: ``x_s = weights[0] x_b + sum_j weights[1 + j]
            f_j`` over the predictions f_j from the base on, oldest first, so ``start`` + 1 numbers. With the base at
            the run's first state (``start`` = step + 1) any explicit solver can be said so (Shaul et al. 2024,
            "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models").
    """

    order: int = 1
    prediction: str = "x0"
    variable: str = "lam"
    start: int = 1
    points: tuple[tuple[int, ...], ...] | None = None
    scale: tuple[float, ...] = ()
    relax: str = "none"
    corrector: str = "none"
    kappa: float = 0.0
    churn: float = 0.0
    call: str = "model"
    skip: int = 0
    time_shift: float = 0.0
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("prediction", PREDICTIONS), ("variable", VARIABLES), ("relax", RELAXATIONS), ("corrector", CORRECTORS),
            ("call", CALLS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of a step", getattr(self, name), list(allowed), "Allowed")
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"the order of a step must be between 1 and {MAX_ORDER}, got {self.order}.")
        if self.start < 1:
            raise ValueError(f"start of a step must be at least 1, got {self.start}.")
        if not 0 <= self.skip < 2**MAX_BLOCKS:
            raise ValueError(f"skip of a step is a bit mask between 0 and 2^{MAX_BLOCKS} - 1, got {self.skip}.")
        if not -0.5 <= self.time_shift <= 0.5:
            raise ValueError(f"time_shift of a step must lie between -0.5 and 0.5, got {self.time_shift}.")
        if self.kappa < 0 or self.churn < 0:
            raise ValueError(f"kappa and churn must not be negative, got {self.kappa} and {self.churn}.")
        if self.prediction == "v" and self.variable not in ("u", "t", "index"):
            raise ValueError(f"prediction v is integrated along u, got variable {self.variable!r}. Use u, t or index.")
        if self.variable == "u" and self.prediction != "v":
            raise ValueError(f"variable u belongs to prediction v, got prediction {self.prediction!r}. Use lam or t.")
        if self.relax != "none" and self.variable != "lam":
            raise ValueError(f"relax {self.relax} is defined in variable lam, got {self.variable!r}. Use relax none.")
        if self.kappa > 0 and self.prediction == "v":
            raise ValueError("kappa > 0 needs prediction x0 or eps: the velocity form has no linear part to relax to.")
        if self.kappa > 0 and self.corrector != "none":
            raise ValueError("a step with kappa > 0 cannot have a corrector: it would correct the fresh noise away.")
        if self.points is not None:
            if len(self.points) != self.order - 1:
                raise ValueError(
                    f"order {self.order} needs points for {self.order - 1} derivatives, got {len(self.points)}."
                )
            for d, group in enumerate(self.points, 1):
                if len(group) < d or len(set(group)) != len(group) or 0 in group:
                    raise ValueError(
                        f"derivative {d} needs at least {d} different points, none of them 0, got {list(group)}."
                    )
        if len(self.scale) > self.order - 1:
            raise ValueError(
                f"a step of order {self.order} has {self.order - 1} derivatives to scale, got {self.scale}."
            )
        if self.weights:
            self._check_weights()

    def _check_weights(self) -> None:
        for name, plain in (("order", 1), ("relax", "none"), ("corrector", "none"), ("kappa", 0.0), ("churn", 0.0)):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"a step with weights says all of itself by them, so its {name} must be {plain}, got "
                    f"{getattr(self, name)}."
                )
        if len(self.weights) != self.start + 1 or not all(map(math.isfinite, self.weights)):
            raise ValueError(
                f"a step with start {self.start} has {self.start + 1} finite weights, of its base and of every "
                f"prediction from there on, got {list(self.weights)}."
            )

    @property
    def stencil(self) -> tuple[tuple[int, ...], ...]:
        """The points of every derivative, with the default filled in: later ones of the block first, then earlier."""
        if self.points is not None:
            return self.points
        nearest = [*range(1, self.start), *(-j for j in range(1, self.order))][: self.order - 1]
        return (tuple(nearest),) * (self.order - 1)

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data without the fields that have their default."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.loads(json.dumps(data))

    @classmethod
    def from_data(cls, data: Any, place: str = "a step") -> Step:
        """The step of plain data.

        Raises:
            ValueError: an unknown field, a wrong type or a value that is not allowed.
        """
        if isinstance(data, Step):
            return data
        if not isinstance(data, Mapping):
            raise ValueError(f"{place} must be fields, for example {{order: 2}}, got {data!r}.")
        known = {f.name: _TYPES[f.name] for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown(f"field of {place}:", key, list(known), "Fields")
        try:
            return cls(**{key: coerce(value, known[key], f"{place}.{key}") for key, value in data.items()})
        except ValueError as error:
            text = str(error)
            raise ValueError(text if place in text else f"{place}: {text}") from None

    def __str__(self) -> str:
        name = {"x0": "data", "eps": "noise", "v": "velocity"}[self.prediction]
        words = [f"order {self.order}" if not self.weights else "free weights", f"{name} prediction"]
        if self.order > 1 or self.corrector != "none":
            words.append(f"in {_WORDS[self.variable]}")
        if self.start > 1:
            words.append(f"from the state of {self.start - 1} evaluations ago")
        if self.weights:
            words.append("weights " + ", ".join(f"{w:.3g}" for w in self.weights))
        if self.points is not None:
            words.append("derivatives from " + "; ".join(",".join(f"{p:+d}" for p in g) for g in self.points))
        if self.scale:
            words.append("scaled by " + ", ".join(f"{s:.3g}" for s in self.scale))
        if self.relax != "none":
            words.append(f"relaxed as {self.relax}")
        words += {"none": [], "pseudo": ["corrected for free"], "implicit": ["corrected implicitly"]}[self.corrector]
        if self.kappa:
            words.append(f"stochastic with kappa {self.kappa:.3g}")
        if self.churn:
            words.append(f"after raising the noise by {100 * self.churn:.3g} %")
        words += {"model": [], "noise": ["without a network call (pure noise)"], "reuse": ["with the last prediction"]}[
            self.call
        ]
        if self.time_shift:
            words.append(f"the network told a time {100 * self.time_shift:+.3g} % of the step further on")
        if self.skip:
            left_out = [str(block) for block in range(self.skip.bit_length()) if self.skip >> block & 1]
            words.append("without block " + ", ".join(left_out) + " of the network")
        return ", ".join(words)


_WORDS = {"lam": "log-SNR", "rho": "sigma / alpha", "t": "time", "u": "angle or flow time", "index": "step number"}
_TYPES: dict[str, Any] = {
    "order": int, "prediction": str, "variable": str, "start": int, "points": tuple[tuple[int, ...], ...] | None,
    "scale": tuple[float, ...], "relax": str, "corrector": str, "kappa": float, "churn": float, "call": str,
    "skip": int, "time_shift": float, "weights": tuple[float, ...],
}  # fmt: skip


@dataclass(frozen=True)
class SolverSchedule:
    """Times and steps of a whole run: N steps between N + 1 times.

    Attributes:
        times: decreasing, from noise (1) to data (0).
        steps: one record a step.
        note: where it came from, for people.
    """

    times: tuple[float, ...]
    steps: tuple[Step, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.times) != len(self.steps) + 1 or not self.steps:
            raise ValueError(
                f"a schedule of N steps needs N + 1 times, got {len(self.steps)} steps and {len(self.times)} times."
            )
        if not all(a > b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"the times of a schedule must decrease, got {list(self.times)}. Sort them from 1 to 0.")
        if self.times[0] > 1 or self.times[-1] < 0:
            raise ValueError(f"the times of a schedule must lie in [0, 1], got {self.times[0]} … {self.times[-1]}.")
        for i, step in enumerate(self.steps):
            check_step(i, len(self.steps), step)
            if i and step.churn and self.steps[i - 1].corrector == "pseudo":
                raise ValueError(
                    f"step {i} has churn, so step {i - 1} cannot have a pseudo corrector: it would correct the "
                    "fresh noise away. Use none or implicit there."
                )

    @property
    def nfe(self) -> int:
        """Network evaluations of one trajectory."""
        wasted = self.times[-1] == 0 and self.steps[-1].corrector == "implicit"  # no network is defined at the data
        return sum(evaluations(step) for step in self.steps) - wasted

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return any(step.kappa > 0 or step.churn > 0 for step in self.steps)

    def to_json(self) -> str:
        """Canonical JSON: times with all their digits, defaults left out."""
        data = {"solver_schedule": 1, "times": list(self.times), "steps": [step.to_data() for step in self.steps]}
        return json.dumps(data | ({"note": self.note} if self.note else {}), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SolverSchedule:
        """The schedule of a JSON text.

        Raises:
            ValueError: no such JSON, another format version, or a schedule that cannot run.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"a schedule must be JSON: {error}.") from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> SolverSchedule:
        """The schedule of plain data."""
        if not isinstance(data, Mapping) or "times" not in data or "steps" not in data:
            raise ValueError(
                "a schedule needs times and steps: {solver_schedule: 1, times: [1, …, 0], steps: [{…}, …]}."
            )
        if data.get("solver_schedule", 1) != 1:
            raise ValueError(f"this schedule has format {data['solver_schedule']!r}; known is 1. Update Solvus.")
        for key in data:
            if key not in ("solver_schedule", "times", "steps", "note"):
                raise unknown("field of a schedule:", key, ["solver_schedule", "times", "steps", "note"], "Fields")
        times = coerce(data["times"], tuple[float, ...], "times")
        return cls(times, parse_steps(data["steps"]), str(data.get("note", "")))

    def read_aloud(self, process: Any = None) -> str:
        """The schedule in words, one line a step, with a bar that shows how far each goes."""
        lines = [f"{len(self.steps)} steps, {self.nfe} evaluations" + (f": {self.note}" if self.note else "")]
        width = 32
        for i, (step, t, s) in enumerate(zip(self.steps, self.times, self.times[1:], strict=False)):
            left, right = round((1 - t) * width), max(round((1 - s) * width), round((1 - t) * width) + 1)
            bar = "." * left + "=" * (right - left) + "." * (width - right)
            where = f"{t:.4f} -> {s:.4f}"
            if process is not None:
                where += f" (lam {process.lam(t):+.2f} -> {process.lam(s):+.2f})"
            lines.append(f"{i + 1:>3} |{bar[:width]}| {where}  {step}")
        return "\n".join(lines)

    def figure(self, process: Any = None) -> Any:
        """A plotly figure: time (or log-SNR) against evaluations, with each step's order."""
        import plotly.graph_objects as go

        spent, y = [0], [self.times[0]]
        for step, s in zip(self.steps, self.times[1:], strict=True):
            spent.append(spent[-1] + evaluations(step))
            y.append(s)
        levels = y if process is None else [process.lam(t) for t in y]
        heights = [level if abs(level) != float("inf") else None for level in levels]
        words = ["start", *(str(step) for step in self.steps)]
        figure = go.Figure(
            go.Scatter(x=spent, y=heights, mode="lines+markers", line={"shape": "hv"}, text=words, hoverinfo="text+x+y")
        )
        figure.update_layout(xaxis_title="evaluations", yaxis_title="time" if process is None else "half log-SNR")
        return figure


def parse_steps(data: Any) -> tuple[Step, ...]:
    """Steps of plain data."""
    if not isinstance(data, Sequence) or isinstance(data, str):
        raise ValueError(f"steps must be a list of steps, got {data!r}.")
    return tuple(Step.from_data(item, f"steps.{i}") for i, item in enumerate(data))


def evaluations(step: Step) -> int:
    """What a step costs."""
    return (step.call == "model") + (step.corrector == "implicit")


def check_step(i: int, num_steps: int, step: Step) -> None:
    """Refuse a step that needs what it cannot have.

    Raises:
        ValueError: an order above the history, a base before the start, a corrector that never gets its evaluation.
    """
    base = i - step.start + 1
    if base < 0:
        raise ValueError(
            f"step {i} starts {step.start - 1} evaluations back, but only {i} came before. Allowed: 1 … {i + 1}."
        )
    for group in step.stencil:
        for offset in group:
            if not 0 <= base + offset <= i:
                raise ValueError(
                    f"step {i} of order {step.order} needs the evaluation at {offset:+d} from its base, but {i} came "
                    f"before it. Allowed is an order of at most {i + 1} here."
                )
    if step.corrector == "pseudo" and i == num_steps - 1:
        raise ValueError(
            "the last step cannot have a pseudo corrector: no evaluation follows it. Use none or implicit."
        )
    if step.call == "reuse" and i == 0:
        raise ValueError("the first step cannot reuse a prediction: there is none. Use model or noise.")


def deepest(steps: Sequence[Step]) -> int:
    """How many evaluations a run must remember."""
    reach = 1
    for step in steps:
        offsets = [o for group in step.stencil for o in group]
        reach = max(reach, step.start, *(step.start - o for o in offsets), 1)
    return reach + 1
