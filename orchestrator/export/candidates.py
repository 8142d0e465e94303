"""How a point is said in diffusers: stock classes where one can be it, then UnifiedScheduler."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestrator.export.point import Point


@dataclass
class Candidate:
    """One way to say the same in diffusers.

    Attributes:
        scheduler: the object.
        call: arguments of ``set_timesteps``.
    """

    scheduler: Any
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its class."""
        return type(self.scheduler).__name__


def candidates(p: Point) -> Iterator[Candidate]:
    """The schedulers that may be the point, best first: stock classes where one can be, then UnifiedScheduler."""
    prediction = prediction_of(p)
    if p.solver is None:
        grid, stock_steps = p.grid
        yield Candidate(p.parts.solver.build(p.process, stock_steps or grid), _stock_call(p, prediction))
        return
    for name, config, call in _stock(p):
        import diffusers

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield Candidate(getattr(diffusers, name)(**config), call)
        except (ValueError, NotImplementedError, TypeError):  # this class refuses it; the next candidate may not
            continue
    # An exact model knows the clean sample, so UnifiedScheduler takes that.
    yield _own(p, prediction if hasattr(p.parts.model, "checkpoint") else "sample")


def prediction_of(p: Point) -> str:
    """What the network says to stock classes, in diffusers' words; an exact model says what they all understand."""
    from tasks.processes import Flow

    if not hasattr(p.parts.model, "checkpoint"):
        return "flow_prediction" if isinstance(p.process, Flow) else "epsilon"
    return {"flow": "flow_prediction"}.get(p.parts.model.checkpoint.prediction, p.parts.model.checkpoint.prediction)


def _stock_call(p: Point, prediction: str) -> dict[str, Any]:
    from tasks.processes import VP

    grid, stock_steps = p.grid
    natural = {"epsilon"} if isinstance(p.process, VP) else {"flow_prediction"}
    if prediction not in natural:
        raise ValueError(
            f"solver=diffusers is told the noise, but this network says {prediction}, which the exported scheduler "
            "would misread. Use solver=unified."
        )
    if stock_steps is not None:
        return {"num_inference_steps": stock_steps}
    told = [p.process.model_time(t) for t in grid[:-1]]
    if isinstance(p.process, VP):
        return {"timesteps": [round(n) for n in told]}
    if "FlowMatch" in p.parts.solver.scheduler:
        return {"timesteps": told, "sigmas": list(grid[:-1])}
    return {"sigmas": list(grid[:-1])}


def _own(p: Point, prediction: str) -> Candidate:
    """UnifiedScheduler: the preset over its grid where the grid can be laid again, else the schedule itself."""
    from tasks.scheduler import UnifiedScheduler, process_config

    assert p.solver is not None
    base = process_config(p.process) | {"prediction_type": prediction}
    hooks = p.solver.get("hooks") or None
    settings = {k: v for k, v in p.solver.items() if k not in ("name", "preset", "steps", "hooks")}
    settings = {k: v for k, v in settings.items() if not (k == "s_noise" and v == 1.0)}
    num_steps = len(p.grid[0]) - 1
    # Ratios belong to their steps, and a grid that was found, or begins elsewhere, cannot be laid for another number.
    is_free = not any("ratios" in hook and hook["ratios"] for hook in hooks or ())
    can_lay = "num_steps" in p.recipe.times and "times" not in p.arrays and p.recipe.initial["name"] == "prior"
    if p.solver.get("steps") is None and can_lay and is_free:
        grid = {k: v for k, v in p.recipe.times.items() if k != "num_steps"}
        own = UnifiedScheduler(**base, preset=p.solver["preset"], settings=settings or None, grid=grid, hooks=hooks)
    else:
        settings = {k: v for k, v in settings.items() if k == "s_noise"}
        data = json.loads(p.schedule.to_json())
        own = UnifiedScheduler(**base, schedule=data, settings=settings or None, hooks=hooks)
    return Candidate(own, {"num_inference_steps": num_steps})


def _stock(p: Point) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Stock classes with configuration and call that have the same formula on the same nodes."""
    from tasks.processes import VP, Flow

    assert p.solver is not None
    schedule, process = p.schedule, p.process
    times, count = schedule.times, len(schedule.steps)
    if p.solver.get("hooks") or schedule.stochastic or times[-1] > 0:
        return
    if times[0] != 1 or p.recipe.initial["name"] != "prior":
        return
    steps = schedule.steps
    is_first = all((s.order, s.start, s.corrector, s.call) == (1, 1, "none", "model") for s in steps)
    if isinstance(process, Flow):
        if is_first:
            flow = {"num_train_timesteps": process.num_train_steps}
            yield "FlowMatchEulerDiscreteScheduler", flow, {"sigmas": list(times[:-1])}
        return
    if not isinstance(process, VP):
        return
    told = [process.model_time(t) for t in times[:-1]]
    if any(abs(n - round(n)) > 1e-6 for n in told):
        return
    nodes = {"timesteps": [round(n) for n in told]}
    base: dict[str, Any] = {
        "beta_schedule": process.schedule, "beta_start": process.beta_start, "beta_end": process.beta_end,
        "num_train_timesteps": process.num_train_steps, "prediction_type": prediction_of(p),
    }  # fmt: skip
    is_uniform = all(abs(t - (1.0 - i / count)) < 1e-12 for i, t in enumerate(times))
    is_divisor = is_uniform and process.num_train_steps % count == 0
    if is_first and is_divisor:
        trailing: dict[str, Any] = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
        yield "DDIMScheduler", base | trailing, {"num_inference_steps": count}
    multistep = [("ddim", 1), ("dpmpp_2m", 2), ("dpmpp_3m_published", 3)]
    for preset, order in multistep:
        if is_first if order == 1 else _is_preset(schedule, process, preset):
            config: dict[str, Any] = {"solver_order": order, "solver_type": "midpoint", "lower_order_final": False}
            yield "DPMSolverMultistepScheduler", base | config, nodes
    if is_divisor and _is_preset(schedule, process, "unipc"):
        yield (
            "UniPCMultistepScheduler",
            base | {"solver_order": 3, "timestep_spacing": "trailing"},
            {"num_inference_steps": count},
        )
    if _is_preset(schedule, process, "heun"):
        # These nodes are given, so the spacing says one thing only: that noise is scaled by sqrt(sigma^2 + 1).
        yield "HeunDiscreteScheduler", base | {"timestep_spacing": "leading"}, nodes


def _is_preset(schedule: Any, process: Any, preset: str) -> bool:
    from tasks import presets

    try:
        return presets.build(presets.settings(preset, {}), process, schedule.times)[0].steps == schedule.steps
    except ValueError:
        return False
