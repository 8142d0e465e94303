"""Dotted paths and values laid over a recipe's plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks import registry
from tasks.registry import Spec, unknown
from tasks.schedule import SolverSchedule

PLUGINS = ("model", "solver", "times", "initial", "guidance", "strategy", "reward")
PLAIN = ("labels", "batch_size", "seed", "dtype", "device")


def overridden(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe with some values replaced; ``Recipe.override`` says how paths are read.

    Raises:
        ValueError: a path or a value that does not exist.
    """
    if "schedule" in changes:
        data |= _scheduled(data, changes["schedule"])
    for path in sorted(changes, key=lambda p: (p.count("."), p == "nfe")):
        value, (head, *rest) = changes[path], path.split(".")
        if path in ("nfe", "schedule", "prompts"):
            continue
        if head not in data:
            raise unknown("override", path, [*PLUGINS, *PLAIN, "nfe", "prompts", "schedule"], "Allowed")
        if not rest:
            data[head] = _whole(head, value, data[head])
        else:
            if data[head] is None:
                raise ValueError(f"{path} cannot be set: there is no {head}.")
            data[head] = _set(data[head], rest, value, path)
    if changes.get("prompts") is not None:
        data["model"] = _prompted(data["model"], changes["prompts"])
    if "nfe" in changes:
        data |= _fit(data, changes["nfe"])
    return data


def _whole(head: str, value: Any, current: Any) -> Any:
    """Replace a top-level value; a bare plug-in name takes that plug-in's defaults and keeps the number of steps."""
    if head not in PLUGINS:
        return value
    if head == "reward" and value in (None, "null"):
        return None
    if head == "guidance" and isinstance(value, list | tuple):
        value = {"name": "chain", "parts": [{"name": part} if isinstance(part, str) else part for part in value]}
    if not isinstance(value, str | Mapping):
        return registry.ALL[head].complete(value)  # refused there
    spec = {"name": value} if isinstance(value, str) else dict(value)
    if head == "times" and "num_steps" not in spec and isinstance(current, dict):
        cls = registry.times.get(spec.get("name", ""))
        if "num_steps" in getattr(cls, "__dataclass_fields__", {}):
            steps = registry.times.build(current).num_steps
            spec["num_steps"] = steps
    return registry.ALL[head].complete(spec)


def _set(data: Any, path: list[str], value: Any, full: str) -> Any:
    head, *rest = path
    if isinstance(data, list):
        if not head.isdigit() or int(head) >= len(data):
            raise ValueError(f"{full} names item {head!r} of a list of {len(data)}; items are numbered from 0.")
        copy = list(data)
        copy[int(head)] = value if not rest else _set(data[int(head)], rest, value, full)
        return copy
    if not isinstance(data, dict):
        raise ValueError(f"{full} goes below {data!r}, which has no fields.")
    return data | {head: value if not rest else _set(data.get(head, {}), rest, value, full)}


def _scheduled(data: dict[str, Any], schedule: Any) -> dict[str, Any]:
    """Solver and times that carry out a schedule; the hooks of a unified solver stay."""
    found = SolverSchedule.from_data(schedule)
    hooks = data["solver"].get("hooks", []) if data["solver"]["name"] == "unified" else []
    solver = {"name": "unified", "steps": [step.to_data() for step in found.steps], "hooks": hooks}
    return {
        "solver": registry.solvers.complete(solver),
        "times": registry.times.complete({"name": "explicit", "values": list(found.times)}),
    }


def _prompted(model: Spec, prompts: Any) -> Spec:
    """The spec of a model that draws a prompt file."""
    if "prompts" not in registry.models.defaults(model["name"]):
        raise ValueError(
            f"prompts={prompts!r} needs a model that reads text, got model={model['name']}. Use model=diffusers."
        )
    return model | {"prompts": prompts}


def _fit(data: dict[str, Any], nfe: Any) -> dict[str, Any]:
    """Solver fields and number of steps that spend exactly ``nfe`` evaluations along one trajectory."""
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe must be a whole number of at least 1, got {nfe!r}.")
    solver = registry.solvers.build(data["solver"])
    fields, steps = solver.fit(nfe)
    times = data["times"]
    if "num_steps" in times:
        times = times | {"num_steps": steps}
    elif registry.times.build(times).num_steps != steps:
        raise ValueError(
            f"nfe={nfe} needs {steps} steps of {data['solver']['name']}, but times {times['name']} has "
            f"{registry.times.build(times).num_steps}. Change one of them."
        )
    return {"solver": data["solver"] | fields, "times": times}
