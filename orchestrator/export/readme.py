"""How to use an exported folder, with a snippet that runs in it."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.export.candidates import prediction_of
from orchestrator.export.check import TOLERANCE
from orchestrator.export.point import Point


def judged(found: dict[str, Any]) -> str:
    """What the check found, in words."""
    gap = found["largest_difference"]
    largest = found["reason"] if gap is None else f"largest difference {gap:.3g} from Solvus's own samples"
    return f"{largest} ({found['compared']}), allowed {TOLERANCE:g}"


def readme(p: Point, found: dict[str, Any], scheduler: Any) -> str:
    """How to use the folder, with a snippet that runs in it."""
    call = ", ".join(f"{key}={json.dumps(value)}" for key, value in found["set_timesteps"].items())
    begins = ""
    if p.recipe.initial["name"] != "prior":
        begins = (
            f"\nThe states begin at t={p.grid[0][0]:.6g}, as `initial={p.recipe.initial['name']}` makes them: put them "
            "in place of x in the snippet. Its artifact, if it has one, is beside this file.\n"
        )
    schedule = ""
    if p.schedule is not None:
        schedule = "- `schedule.json`: every step, for `solvus run schedule=FILE` and `solvus show schedule FILE`\n"
    artifacts = "".join(f"- `artifact-{place}.safetensors`: for `{place}.artifact=FILE`\n" for place in p.arrays)
    warning = "" if found["ok"] else "**This export FAILED: do not use it.** "
    return (
        f"# {found['scheduler']}\n\n"
        f"Recipe {p.recipe.key} of Solvus: model {p.recipe.model['name']}, solver {p.recipe.solver['name']}, "
        f"{p.recipe.nfe} evaluations a sample. {warning}Checked: {judged(found)}.\n\n"
        f"```python\n{_imports(p, found)}\n{_loop_text(p, scheduler, call)}```\n{begins}\n"
        f"- `scheduler/`: for `from_pretrained`\n{schedule}{artifacts}- `check.json`: what was compared\n"
    )


def _imports(p: Point, found: dict[str, Any]) -> str:
    from tasks.checkpoint import WEIGHTS

    module = "tasks.scheduler" if found["scheduler"] == "UnifiedScheduler" else "diffusers"
    if not hasattr(p.parts.model, "checkpoint"):
        kind = "" if module == "tasks.scheduler" else f", {prediction_of(p)!r}"
        names = sorted({"Network"} | ({"UnifiedScheduler"} if module == "tasks.scheduler" else set()))
        stock = "" if module == "tasks.scheduler" else f"from diffusers import {found['scheduler']}\n"
        return (
            f"import torch\n{stock}from tasks.registry import models\n"
            f"from tasks.scheduler import {', '.join(names)}\n\n"
            f'unet = Network(models.build({p.recipe.model!r}).load("cpu"){kind})'
        )
    folder = p.parts.model.checkpoint.unet
    if folder.is_relative_to(WEIGHTS):
        place = " / ".join(["WEIGHTS", *(f'"{part}"' for part in folder.relative_to(WEIGHTS).parts)])
        weights = "from tasks.checkpoint import WEIGHTS\n"
    else:
        place, weights = f'"{folder.absolute()}"', ""
    if module == "diffusers":
        lines = f"from diffusers import {', '.join(sorted(['UNet2DModel', found['scheduler']]))}\n{weights}"
    else:
        lines = f"from diffusers import UNet2DModel\n{weights}from tasks.scheduler import UnifiedScheduler\n"
    return f"import torch\n{lines}\nunet = UNet2DModel.from_pretrained({place}).requires_grad_(False)"


def _loop_text(p: Point, scheduler: Any, call: str) -> str:
    shape, classes = p.parts.model.shape, p.parts.model.num_classes
    sizes = ", ".join(map(str, (4, *shape)))
    labels = ""
    if classes:
        labels = ", torch.arange(4)" if p.recipe.has_labels else f", torch.full((4,), {classes})"
    seen = "scheduler.scale_model_input(x, t)" if hasattr(scheduler, "scale_model_input") else "x"
    scale = " * scheduler.init_noise_sigma" if hasattr(scheduler, "init_noise_sigma") else ""
    ask = f"unet({seen}, t{labels}).sample"
    if p.recipe.guidance["name"] == "cfg":
        without = f"unet({seen}, t, torch.full((4,), {classes})).sample"
        ask = f"torch.lerp({without}, {ask}, {p.recipe.guidance['scale']})"
    return (
        f'scheduler = {type(scheduler).__name__}.from_pretrained("scheduler")\n'
        f"scheduler.set_timesteps({call})\n"
        f"x = torch.randn({sizes}){scale}\n"
        "for t in scheduler.timesteps:\n"
        f"    x = scheduler.step({ask}, t, x).prev_sample\n"
    )
