"""The part of a search space that is a whole solver schedule, step by step.

    schedule:
      nfe: 5                          # or a list, to search it jointly
      times: free                     # every node; or a grid whose fields are searched: {name: curve, …}
      order: [1, 2, 3]                # a list is searched at every step, a single value is fixed
      prediction: [x0, eps]
      variable: [lam, t]
      points: [full, near]            # each derivative from all points of the order, or from the nearest that suffice
      relax: [none, bh1, bh2]         # B(h) of UniPC and DPM-Solver++ in place of the exact first-derivative weight
      scale: {low: 0.0, high: 3.0}    # factor on the first derivative's term (scale2: on the second's)
      corrector: [none, pseudo]       # implicit costs an evaluation more, so the run has a step less
      kappa: {low: 0.0, high: 1.0}
      time_shift: {low: -0.3, high: 0.3}  # the network is told another time, by this share of the step
      call: [model, noise]            # of the first step; noise costs nothing, so the run has a step more
      weights: {low: -2, high: 2}     # instead of all from order to kappa: free weights of the first state and of every
                                      # prediction so far, in the form of ``prediction``; (n^2 + 3 n) / 2 axes
      skip: 8                         # how many of the network's blocks may be left out, each step for itself

Every point is a schedule that can run: what is impossible where a step stands (an order without history, a corrector
before the end, an expansion at an infinite log-SNR) becomes the nearest that is possible. Free nodes are fractions of
the node before, so changing one leaves all earlier steps as they were.

Reference: Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (the
decisions of a step); Shaul et al. 2024, "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models"
(free weights).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import registry
from tasks.adapt import possible, weighted
from tasks.coefficients import Update, relaxation
from tasks.integrator import Plan
from tasks.recipe import Recipe
from tasks.registry import unknown
from tasks.schedule import CALLS, CORRECTORS, MAX_BLOCKS, PREDICTIONS, RELAXATIONS, VARIABLES, SolverSchedule, Step

if TYPE_CHECKING:
    from orchestrator.space import Axis

WORDS: dict[str, tuple[Any, ...]] = {
    "order": (1, 2, 3, 4), "prediction": PREDICTIONS, "variable": VARIABLES, "points": ("full", "near"),
    "relax": RELAXATIONS, "corrector": CORRECTORS, "call": CALLS[:2],
}  # fmt: skip
NUMBERS = ("scale", "scale2", "kappa", "time_shift")
UNWEIGHTED = tuple(key for key in (*WORDS, *NUMBERS) if key not in ("prediction", "time_shift"))
DEFAULTS: dict[str, Any] = {
    "order": 2, "prediction": "x0", "variable": "lam", "points": "full", "relax": "none", "corrector": "none",
    "call": "model", "scale": 1.0, "scale2": 1.0, "kappa": 0.0,
    "time_shift": 0.0,
}  # fmt: skip
RATIO = {"low": 0.05, "high": 0.98}
MAX_NFE = 64


def evaluations(data: Mapping[str, Any], recipe: Recipe, most: int) -> tuple[int, ...]:
    """The numbers of evaluations of a schedule's space; the study's where ``nfe`` is left out.

    Raises:
        ValueError: there is none, or one that is no whole number between 1 and ``most``.
    """
    found = data.get("nfe", recipe.parts.solver.nfe(recipe.parts.times.num_steps))
    nfes = tuple(found) if isinstance(found, list | tuple) else (found,)
    if not nfes:
        raise ValueError("search.space.schedule.nfe is empty. Name a number of evaluations, or leave it out.")
    for nfe in nfes:
        if isinstance(nfe, bool) or not isinstance(nfe, int) or not 1 <= nfe <= most:
            raise ValueError(f"search.space.schedule.nfe must be whole numbers between 1 and {most}, got {nfe!r}.")
    return nfes


class ScheduleSpace:
    """The axes of a schedule and the way from a point to a schedule that can run.

    Args:
        data: the YAML below ``schedule``.
        recipe: the study's: its process, and its number of evaluations where ``nfe`` is left out.
        parse: makes an axis of one entry.

    Raises:
        ValueError: an unknown or impossible entry.
    """

    def __init__(self, data: Any, recipe: Recipe, parse: Callable[[str, Any], Axis]) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"search.space.schedule must be a mapping, for example {{times: free}}, got {data!r}.")
        known = ["nfe", "times", *WORDS, *NUMBERS, "weights", "skip"]
        for key in data:
            if key not in known:
                raise unknown("field of search.space.schedule:", key, known, "Fields")
        self.process = recipe.parts.model.noising
        if self.process.kind != "gaussian":
            raise ValueError(
                f"search.space.schedule opens schedules for Gaussian processes, but model {recipe.model['name']} is "
                f"{self.process.kind}. Search its solver's own fields instead."
            )
        self.start = recipe.parts.initial.start(self.process)
        self._parse = parse
        self.nfes = evaluations(data, recipe, MAX_NFE)
        self._axes: dict[str, Any] = {}
        self._fixed = dict(DEFAULTS)
        for key in (*WORDS, *NUMBERS):
            if key in data:
                self._take(key, data[key])
        self._weights = self._take_weights(data)
        self._times = self._take_times(data.get("times", "free"))
        self.skip = self._take_skip(data.get("skip", 0), recipe)
        self._longest = max(self.nfes) + ("noise" in self._values("call"))

    def _values(self, key: str) -> tuple[Any, ...]:
        return tuple(self._axes[key]) if key in self._axes else (self._fixed[key],)

    def _take(self, key: str, value: Any) -> None:
        if key in WORDS:
            values = list(value) if isinstance(value, list | tuple) else [value]
            for item in values:
                if item not in WORDS[key] or isinstance(item, bool):
                    raise unknown(f"search.space.schedule.{key}", item, [str(w) for w in WORDS[key]], "Allowed")
            if len(values) > 1:
                self._axes[key] = values
            elif values:
                self._fixed[key] = values[0]
            else:
                raise ValueError(
                    f"search.space.schedule.{key} is empty. Give one of {', '.join(map(str, WORDS[key]))}."
                )
        elif isinstance(value, Mapping):
            axis = self._parse(f"schedule.{key}", value)
            if axis.choices is not None or axis.low < 0 and key == "kappa":
                raise ValueError(f"search.space.schedule.{key} must be {{low, high}}, got {dict(value)!r}.")
            if key == "time_shift" and not -0.5 <= axis.low <= axis.high <= 0.5:
                raise ValueError(
                    f"search.space.schedule.time_shift must lie between -0.5 and 0.5, got {dict(value)!r}."
                )
            self._axes[key] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._fixed[key] = float(value)
        else:
            raise ValueError(f"search.space.schedule.{key} must be a number or {{low, high}}, got {value!r}.")

    def _take_weights(self, data: Mapping[str, Any]) -> Any:
        """The interval of every weight; None where steps are expansions."""
        if (value := data.get("weights")) is None:
            return None
        if not isinstance(value, Mapping) or self._parse("schedule.weights", value).choices is not None:
            raise ValueError(f"search.space.schedule.weights must be {{low, high}}, got {value!r}.")
        for key in (*UNWEIGHTED, *(["prediction"] if "prediction" in self._axes else [])):
            if key in data and (key in self._axes or self._fixed[key] != DEFAULTS[key]):
                raise ValueError(
                    f"search.space.schedule.weights say all of a step in one prediction, so {key} cannot be "
                    f"{data[key]!r}. Leave {'only one' if key == 'prediction' else 'it out, or leave weights out'}."
                )
        return value

    def _take_times(self, value: Any) -> Any:
        """``free``, or the spec of a grid whose fields may be intervals."""
        if value == "free":
            return RATIO
        if isinstance(value, Mapping) and "name" not in value:
            self._parse("schedule.times", value)
            return dict(value)
        spec = {"name": value} if isinstance(value, str) else dict(value)
        cls = registry.times.get(spec["name"])
        if "num_steps" not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            raise ValueError(f"search.space.schedule.times {spec['name']!r} has a fixed number of steps. Use free.")
        for name, item in spec.items():
            if isinstance(item, Mapping | list):
                self._parse(f"schedule.times.{name}", item)
        return spec

    def _take_skip(self, value: Any, recipe: Recipe) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BLOCKS:
            raise ValueError(
                f"search.space.schedule.skip must be a number of blocks between 0 and {MAX_BLOCKS}, got {value!r}."
            )
        blocks = getattr(recipe.parts.model, "blocks", None)
        if value > (0 if blocks is None else len(blocks.names)):
            has = "no blocks" if blocks is None else f"{len(blocks.names)} blocks"
            raise ValueError(
                f"search.space.schedule.skip is {value}, but model {recipe.model['name']} has {has} that can be left "
                "out. Use at most that many."
            )
        return value

    # --- a point -----------------------------------------------------------------------------------------------------

    def walk(self, ask: Callable[[Axis], Any]) -> dict[str, Any]:
        """The schedule, as data, whose decisions ``ask`` makes."""
        nfe = self.nfes[0] if len(self.nfes) == 1 else ask(self._parse("nfe", list(self.nfes)))
        made: list[dict[str, Any]] = []
        spent = 0
        while spent < nfe:
            i = len(made)
            step: dict[str, Any] = {}
            if self._weights is not None:
                step["weights"] = tuple(ask(self._parse(f"weight.{i}.{j}", self._weights)) for j in range(i + 2))
            for key in WORDS:
                step[key] = self._ask_word(ask, key, i)
            step["scale"] = self._ask_number(ask, "scale", i, i > 0 and step["order"] > 1)
            step["scale2"] = self._ask_number(ask, "scale2", i, i > 1 and step["order"] > 2)
            step["kappa"] = self._ask_number(ask, "kappa", i, True)
            step["time_shift"] = self._ask_number(ask, "time_shift", i, True)
            cost = (step["call"] == "model") + (step["corrector"] == "implicit")
            if spent + cost >= nfe or not self._can_correct(i, step):  # or nothing would follow
                step["corrector"], cost = "none", int(step["call"] == "model")
            if self.skip:
                step["skip"] = ask(self._parse(f"skip.{i}", {"low": 0, "high": 2**self.skip - 1}))
            made.append(step)
            spent += cost
        times = self._ask_times(ask, len(made))
        return json.loads(self.runnable(times, made).to_json())

    def _can_correct(self, i: int, step: Mapping[str, Any]) -> bool:
        """Whether a step that is not the last may have a corrector: not over fresh noise, not from alpha = 0."""
        if step["prediction"] == "v":
            return True
        return step["kappa"] == 0 and not (i == 0 and self.process.alpha(self.start) == 0)

    def _ask_word(self, ask: Callable[[Axis], Any], key: str, i: int) -> Any:
        if key not in self._axes or (key in ("variable", "points") and i == 0):
            return self._fixed[key] if key not in self._axes else self._axes[key][0]
        allowed = self._axes[key]
        if key == "call":
            return ask(self._parse("call.0", allowed)) if i == 0 else "model"
        if key == "order":
            allowed = [order for order in allowed if order <= i + 1]
            if len(allowed) < 2:
                return allowed[0] if allowed else 1
        return ask(self._parse(f"{key}.{i}", allowed))

    def _ask_number(self, ask: Callable[[Axis], Any], key: str, i: int, applies: bool) -> float:
        if key in self._axes and applies:
            return ask(self._parse(f"{key}.{i}", self._axes[key]))
        return self._fixed[key]

    def _ask_times(self, ask: Callable[[Axis], Any], num_steps: int) -> tuple[float, ...]:
        if "name" not in self._times:
            times = [self.start]
            for i in range(1, num_steps):
                ratio = ask(self._parse(f"ratio.{i}", self._times))
                # Never so near to the data that the network was not trained there, and always a step of its own.
                floor = 2 * self.process.t_min * (num_steps - i)
                times.append(min(max(times[-1] * ratio, floor), times[-1] * 0.999))
            return (*times, 0.0)
        spec = {"num_steps": num_steps}
        for name, value in self._times.items():
            is_axis = isinstance(value, Mapping | list)
            spec[name] = ask(self._parse(f"times.{name}", value)) if is_axis else value
        return registry.times.build(spec)(self.process, self.start)

    def runnable(self, times: tuple[float, ...], made: list[dict[str, Any]]) -> SolverSchedule:
        """The schedule that makes these decisions as far as they are possible."""
        return possible(self.process, times, [self._wanted(i, chosen) for i, chosen in enumerate(made)])

    def _wanted(self, i: int, chosen: dict[str, Any]) -> Step:
        """One step as it was decided, whether or not it can be taken where it stands."""
        order, prediction, variable = min(chosen["order"], i + 1), chosen["prediction"], chosen["variable"]
        if prediction == "v":
            variable = variable if variable in ("u", "t", "index") else "u"
        elif variable == "u":
            variable = "t"
        kappa = chosen["kappa"] if prediction != "v" else 0.0
        scale = (chosen["scale"], chosen["scale2"])[: order - 1]
        points = (
            tuple(tuple(-j for j in range(1, d + 1)) for d in range(1, order)) if chosen["points"] == "near" else None
        )
        if self._weights is not None:
            step = Step(prediction=prediction, variable=variable, start=i + 1, weights=chosen["weights"],
                        time_shift=chosen["time_shift"])  # fmt: skip
            return replace(step, skip=chosen.get("skip", 0))
        step = Step(
            order,
            prediction,
            variable,
            points=points if order > 2 else None,
            scale=() if all(s == 1.0 for s in scale) else scale,
            relax=chosen["relax"] if variable == "lam" else "none",
            corrector=chosen["corrector"] if kappa == 0 else "none",
            kappa=kappa,
            call=chosen["call"],
            time_shift=chosen["time_shift"],
        )
        if chosen.get("skip"):
            step = replace(step, skip=chosen["skip"])
        return step

    # --- back from a schedule ----------------------------------------------------------------------------------------

    def reader(self, data: Any) -> Callable[[Axis], Any]:
        """What a given schedule answers to each axis; KeyError for what it cannot say."""
        schedule = SolverSchedule.from_data(data)
        if self._weights is not None:
            schedule = self._weighted(schedule)

        def read(axis: Axis) -> Any:
            head, _, place = axis.name.partition(".")
            if head == "nfe":
                return schedule.nfe
            if head == "times":
                raise KeyError(axis.name)
            i = int(place.partition(".")[0])
            if i >= len(schedule.steps):
                raise KeyError(axis.name)
            if head == "ratio":
                return schedule.times[i] / schedule.times[i - 1]
            step = schedule.steps[i]
            if head == "weight":
                return step.weights[int(place.partition(".")[2])]
            if head in ("scale", "scale2") and step.order < (2 if head == "scale" else 3):
                return 0.0  # where the space fixes a higher order
            if head == "scale":
                scale = step.scale[0] if step.scale else 1.0
                if "relax" in self._axes or step.relax == self._fixed["relax"]:
                    return scale
                return scale * relaxation(self.process, step, schedule.times[i], schedule.times[i + 1])
            if head == "scale2":
                return step.scale[1] if len(step.scale) > 1 else 1.0
            if head == "points":
                return "full" if step.points is None else "near"
            if head == "skip":
                if step.skip >> self.skip:
                    raise KeyError(axis.name)  # it leaves out blocks that the space keeps
                return step.skip
            return getattr(step, head)

        if any(step.start > 1 and not step.weights for step in schedule.steps):
            raise KeyError("singlestep blocks are no points of a space of steps")
        if len(schedule.steps) > self._longest or schedule.nfe not in self.nfes:
            raise KeyError("another number of evaluations")
        return read

    def _weighted(self, schedule: SolverSchedule) -> SolverSchedule:
        prediction = self._fixed["prediction"]
        # One that is in that form stays as it is, to the last bit: read back, it is the same recipe.
        if all(s.weights and s.prediction == prediction and s.start == i + 1 for i, s in enumerate(schedule.steps)):
            return schedule
        try:
            return weighted(self.process, schedule, prediction)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def equal(self, data: Any, other: SolverSchedule) -> bool:
        """Whether a schedule, as data, does the same as another one, up to rounding."""
        one, two = (Plan(self.process, found) for found in (SolverSchedule.from_data(data), other))
        if len(one.steps) != len(two.steps) or not np.allclose(one.times, two.times, rtol=1e-9, atol=0):
            return False
        if [(s.corrector, s.call, s.prediction, s.skip, s.time_shift, bool(s.weights)) for s in one.steps] != [
            (s.corrector, s.call, s.prediction, s.skip, s.time_shift, bool(s.weights)) for s in two.steps
        ]:
            return False
        return all(
            _close(a, b)
            for a, b in zip([*one.updates, *one.corrections], [*two.updates, *two.corrections], strict=True)
        )

    # --- for those who look at many points ---------------------------------------------------------------------------

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Every axis that some point has."""
        found: dict[str, Any] = {}
        if len(self.nfes) > 1:
            found["nfe"] = self._parse("nfe", list(self.nfes))
        for i in range(self._longest):
            for key in WORDS:
                if key not in self._axes or (key in ("variable", "points") and i == 0):
                    continue
                allowed = self._axes[key]
                if key == "call" and i > 0:
                    continue
                if key == "order":
                    allowed = [order for order in allowed if order <= i + 1]
                    if len(allowed) < 2:
                        continue
                found[f"{key}.{i}"] = self._parse(f"{key}.{i}", allowed)
            for key, first in (("scale", 1), ("scale2", 2), ("kappa", 0), ("time_shift", 0)):
                if key in self._axes and i >= first:
                    found[f"{key}.{i}"] = self._parse(f"{key}.{i}", self._axes[key])
            if self._weights is not None:
                for j in range(i + 2):
                    found[f"weight.{i}.{j}"] = self._parse(f"weight.{i}.{j}", self._weights)
            if self.skip:
                found[f"skip.{i}"] = self._parse(f"skip.{i}", {"low": 0, "high": 2**self.skip - 1})
            if i and "name" not in self._times:
                found[f"ratio.{i}"] = self._parse(f"ratio.{i}", self._times)
        if "name" in self._times:
            for name, value in self._times.items():
                if isinstance(value, Mapping | list):
                    found[f"times.{name}"] = self._parse(f"times.{name}", value)
        return tuple(found.values())

    def features(self, params: Mapping[str, Any]) -> list[float]:
        """Where the nodes of a point lie, in time and in log-SNR: what the ratios mean together."""
        schedule = SolverSchedule.from_data(self.walk(lambda axis: params[axis.name]))
        found: list[float] = []
        for i in range(self._longest - 1):
            t = schedule.times[i + 1] if i + 1 < len(schedule.steps) else 0.0
            lam = self.process.lam(t) if t > 0 else 8.0
            found += [t, max(min(lam, 8.0), -8.0) / 8.0 if math.isfinite(lam) else 1.0]
        return found


def _close(a: Update | None, b: Update | None) -> bool:
    if a is None or b is None:
        return a is b
    pairs = [(a.carry, b.carry), (a.std, b.std)]
    weights, others = dict(a.weights), dict(b.weights)
    pairs += [(weights.get(o, 0.0), others.get(o, 0.0)) for o in {*weights, *others}]
    return all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in pairs)
