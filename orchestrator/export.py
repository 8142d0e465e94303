"""The verb that hands a point of a study to diffusers: a scheduler folder, checked against Solvus's own samples."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator.exits import COMPLETE, FAILED
from orchestrator.verbs_look import emit

TOLERANCE = 1e-5
ROWS = 8


@dataclass(frozen=True)
class Point:
    """What is exported: a recipe with its artifacts in place.

    Attributes:
        recipe: the recipe.
        parts: its plug-ins, with artifacts.
        arrays: the artifacts by their place.
        solver: the spec of the unified solver that does the same; None for a stock scheduler.
        grid: the times, and the number of steps of a stock scheduler's own grid.
    """

    recipe: Any
    parts: Any
    arrays: dict[str, tuple[dict[str, Any], Any]]
    solver: dict[str, Any] | None
    grid: tuple[tuple[float, ...], int | None]

    @property
    def process(self) -> Any:
        """The noising process."""
        return self.parts.model.noising

    @property
    def schedule(self) -> Any:
        """What the solver does, as data; None for a stock scheduler."""
        from dataclasses import replace

        from tasks import registry

        if self.solver is None:
            return None
        found = registry.solvers.build(self.solver).schedule(self.process, self.grid[0])
        return replace(found, note=f"exported from recipe {self.recipe.key}")


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


def export(args: Any) -> int:
    """``solvus export``."""
    from orchestrator import config

    numbers = [item for item in args.overrides if item.startswith("trial=")]
    data = config.compose([item for item in args.overrides if item not in numbers], args.config_dir)
    if args.cfg:
        from omegaconf import OmegaConf

        from orchestrator.redact import redact_all

        shown = redact_all(data)
        print(json.dumps(shown, indent=1) if args.json else OmegaConf.to_yaml(OmegaConf.create(shown)), end="")
        return COMPLETE
    folder = Path(args.out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {args.out!r} exists and is not an empty folder. Give a new one.")
    root = config.root_of(data)
    recipe = _of_trial(root, str(data["name"]), numbers[-1]) if numbers else config.study(data).recipe
    found = write(point(recipe, root), folder)
    lines = [
        f"{found['scheduler']} in {folder}: {_judged(found)}",
        *(f"  not {gone['scheduler']}: {gone['reason']}" for gone in found["rejected"]),
        f"  files: {', '.join(found['files'])}",
    ]
    if not found["ok"]:
        lines[0] = f"export FAILED: {lines[0]}"
    emit(args, found | {"folder": str(folder)}, "\n".join(lines))
    return COMPLETE if found["ok"] else FAILED


def _judged(found: dict[str, Any]) -> str:
    gap = found["largest_difference"]
    largest = found["reason"] if gap is None else f"largest difference {gap:.3g} from Solvus's own samples"
    return f"{largest} ({found['compared']}), allowed {TOLERANCE:g}"


def _of_trial(root: str, name: str, text: str) -> Any:
    """The recipe of a trial of a finished study.

    Raises:
        ValueError: there is no such trial, or it never had a recipe that could run.
    """
    from orchestrator.results import Results
    from orchestrator.store import Store
    from tasks.recipe import Recipe

    results = Results(root, name)
    results.study()
    rows = {row["number"]: row for row in results.trials()}
    number = text.partition("=")[2]
    if number == "best":
        number = str(results.best()["number"])
    if not number.isdigit() or int(number) not in rows:
        raise ValueError(f"study {name} has no trial {number!r}. It has {_span(sorted(rows))}, and best.")
    row = rows[int(number)]
    saved = Store(root, create=False).get_json("recipes", row["key"])
    if saved is None:
        raise ValueError(
            f"trial {number} of {name} left no recipe in the store ({row['state']} {row['reason']}). Choose another."
        )
    recipe = Recipe(**saved)
    if recipe.key != row["key"]:
        raise ValueError(
            f"the recipe of trial {number} is {recipe.key} here, but was {row['key']}: the model's weights changed. "
            "Run the study again."
        )
    return recipe


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


# --- what is exported ------------------------------------------------------------------------------------------------


def point(recipe: Any, root: str | None = None) -> Point:
    """The point that a recipe is, with the artifacts of its calibrations.

    Args:
        recipe: what to export.
        root: whose store may have the artifacts; they are made where it has not.

    Raises:
        ValueError: no diffusers scheduler can do what the recipe does.
    """
    from tasks import calibration
    from tasks.recipe import grid_of

    recipe.check()
    parts = recipe.parts
    if recipe.strategy["name"] != "single":
        raise ValueError(
            f"strategy {recipe.strategy['name']} runs several trajectories and chooses among them, which a scheduler "
            "cannot. Set strategy=single to export one of its trajectories."
        )
    if getattr(parts.times, "travels", False):
        raise ValueError(f"times {recipe.times['name']} jump back, which a scheduler cannot. Use another grid.")
    if recipe.guidance["name"] not in ("none", "cfg"):
        raise ValueError(
            f"guidance {recipe.guidance['name']} has no counterpart in a stock loop, so the export cannot be checked. "
            "Allowed: none, cfg."
        )
    if getattr(parts.guidance, "limited", False):
        raise ValueError(
            "guidance.sigma_low and sigma_high limit guidance to some noise levels, but a stock loop guides at every "
            "step. Set both to null."
        )
    if recipe.masks:
        raise ValueError(
            f"the schedule leaves out blocks of the network (skip={max(recipe.masks)}), which a stock scheduler "
            "cannot: it never sees the network. Set skip to 0 in every step."
        )
    if any(step.time_shift for step in getattr(parts.solver, "records", None) or ()):
        raise ValueError(
            "the schedule tells the network other times (time_shift), which a stock pipeline cannot: it tells it the "
            "grid's. Set time_shift to 0 in every step."
        )
    _unified(recipe, parts)  # refuses before anything is made
    arrays: dict[str, tuple[dict[str, Any], Any]] = {}
    for needed in recipe.calibrations:
        found = _artifact(recipe, needed, parts, root)
        arrays[needed.place] = (needed.meta, found)
        parts = calibration.bind(parts, needed.place, calibration.arrays_for(recipe, needed, found))
    return Point(recipe, parts, arrays, _unified(recipe, parts), grid_of(parts))


def _artifact(recipe: Any, needed: Any, parts: Any, root: str | None) -> Any:
    from safetensors.numpy import load_file

    from orchestrator.plan import ARTIFACTS
    from orchestrator.store import Store
    from tasks import calibration

    if needed.key.startswith("file:"):  # read and compared with the recipe when its key was made
        return load_file(dict(calibration.places(recipe.parts))[needed.place].artifact)
    try:
        stored = None if root is None else Store(root, create=False).get_arrays(ARTIFACTS, needed.key)
    except ValueError:  # no store there yet
        stored = None
    if stored is not None:
        return stored
    print(f"solvus: calibrating {needed.place}", file=sys.stderr, flush=True)
    return calibration.make(recipe, needed, parts)[0]


def _unified(recipe: Any, parts: Any) -> dict[str, Any] | None:
    """The spec of the unified solver that makes the recipe's steps; None for a stock scheduler.

    Raises:
        ValueError: its solver is none that a scheduler can carry.
    """
    from tasks.processes import EDM
    from tasks.scheduler import process_config, refuse_hook

    solver, name = recipe.solver, recipe.solver["name"]
    process_config(parts.model.noising)
    if name == "diffusers":
        if isinstance(parts.model.noising, EDM):
            raise ValueError(
                "stock EDM classes expect networks with a preconditioning of their own, which this model has not. Use "
                "solver=unified, which is exported as it is."
            )
        return None
    if name == "unified":
        hooks = []
        for spec, hook in zip(solver["hooks"], parts.solver.hook_objects, strict=True):
            ratios = getattr(hook, "calibrated", {}).get("ratios")
            if ratios is not None:  # found for exactly these steps
                spec = spec | {"ratios": [float(r) for r in ratios], "artifact": ""}
            elif spec["name"] != "compensation":  # whose ratios come with its artifact
                refuse_hook(hook)
            hooks.append(spec)
        return {key: value for key, value in solver.items() if value is not None} | {"hooks": hooks}
    same: dict[str, dict[str, Any]] = {
        "ddim": {"preset": "ddim", "eta": solver.get("eta") or None},
        "euler": {"preset": "ddim"},
        "rectified_flow": {"preset": "ddim"},
        "heun": {"preset": "heun", "leading": solver.get("leading_euler_steps") or None},
        "dpmpp_2m": {"preset": "dpmpp_2m", "lower_order_final": solver.get("lower_order_final") or None},
    }
    if name not in same:
        raise ValueError(
            f"solver {name} cannot be said as a diffusers scheduler. Allowed: "
            f"{', '.join([*same, 'unified', 'diffusers'])}."
        )
    return {"name": "unified"} | {key: value for key, value in same[name].items() if value is not None}


# --- how it is said in diffusers -------------------------------------------------------------------------------------


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


# --- writing and checking --------------------------------------------------------------------------------------------


def write(p: Point, folder: Path) -> dict[str, Any]:
    """Write the folder with the first candidate that equals Solvus's samples; what ``check.json`` holds.

    Where none does, the last one stays, and ``ok`` is false.
    """
    import shutil

    from tasks import calibration

    check = Check(p)
    rejected: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    largest, reason = math.inf, ""
    for candidate in candidates(p):
        if found:  # the one before was not good enough
            rejected.append({"scheduler": found["scheduler"], "reason": reason})
            shutil.rmtree(folder / "scheduler")
        folder.mkdir(parents=True, exist_ok=True)
        candidate.scheduler.save_pretrained(folder / "scheduler")
        largest, reason = check.difference(candidate, folder / "scheduler")
        found = {"scheduler": candidate.name, "set_timesteps": candidate.call, "largest_difference": largest}
        if largest <= TOLERANCE:
            break
    ok = largest <= TOLERANCE
    if not math.isfinite(largest):  # JSON has no infinity
        found["largest_difference"] = None
    found |= {
        "ok": ok,
        "reason": None if ok else reason,
        "tolerance": TOLERANCE,
        "compared": check.compared,
        "rejected": rejected,
    }
    found |= {"recipe": p.recipe.key, "model": p.recipe.model["name"], "revision": p.parts.model.revision}
    files = ["scheduler/scheduler_config.json"]
    if p.schedule is not None:
        (folder / "schedule.json").write_text(p.schedule.to_json() + "\n")
        files.append("schedule.json")
    for place, (meta, arrays) in p.arrays.items():
        calibration.save(folder / f"artifact-{place}.safetensors", meta, arrays)
        files.append(f"artifact-{place}.safetensors")
    found["files"] = [*files, "README.md", "check.json"]
    (folder / "README.md").write_text(readme(p, found, candidate.scheduler))
    (folder / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


class Check:
    """Solvus's own samples, and what a scheduler from disk makes of the same starting noise."""

    def __init__(self, p: Point) -> None:
        import torch

        from tasks.noise import RowNoise
        from tasks.run import load_model, use_one_thread
        from tasks.sampler import CountedModel, Sampler

        use_one_thread()
        self.p, recipe = p, p.recipe
        self.model = load_model(recipe)
        indices = torch.arange(ROWS, device=recipe.device)
        self.labels: Any = None
        if self.model.num_classes:
            self.labels = torch.tensor([recipe.label(i) for i in range(ROWS)], device=recipe.device)
        guided = p.parts.guidance.wrap(CountedModel(self.model, recipe.batch_size))
        grid, stock_steps = p.grid
        sampler = Sampler(guided, p.parts.solver, grid, self.labels, stock_steps, p.parts.initial)
        self.rows = cast(Any, RowNoise(recipe.seed, indices))
        with torch.no_grad():
            state = sampler.start(self.rows)
            self.start = state.x
            self.is_random = p.solver is not None and p.schedule.stochastic
            noise: Any = Stream(ROWS, recipe.device) if self.is_random else self.rows
            for _ in range(sampler.num_steps):
                state = sampler.step(state, noise)
        self.end = state.x
        self.compared = f"{ROWS} rows in float32, from the same starting noise" + (
            " and with the same generator for fresh noise" if self.is_random or p.solver is None else ""
        )

    def difference(self, candidate: Candidate, folder: Path) -> tuple[float, str]:
        """The largest difference over all entries of all rows, and in words what is wrong with it."""
        import torch

        from tasks.scheduler import UnifiedScheduler

        cls: Any = type(candidate.scheduler)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                end = self._loop(cls.from_pretrained(str(folder)), candidate.call)
        except Exception as error:  # whatever a stock class raises on what it cannot do
            if cls is UnifiedScheduler:
                raise
            return math.inf, f"it raised {error!r}"
        if not torch.isfinite(end).all():
            return math.inf, "its samples are not finite"
        gap = float((end - self.end).abs().max())
        return gap, f"it differs by {gap:.3g}"

    def _loop(self, scheduler: Any, call: dict[str, Any]) -> Any:
        """The denoising loop of every pipeline."""
        import inspect

        import torch

        p, device = self.p, self.p.recipe.device
        network = self._network(scheduler)
        scheduler.set_timesteps(**call, device=device)
        # Flow-matching classes have neither a scale of the noise nor one of the input.
        x = self.start * (float(getattr(scheduler, "init_noise_sigma", 1.0)) / p.process.prior_std(p.grid[0][0]))
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        stream = torch.Generator(device).manual_seed(0)
        stride = max(len(scheduler.timesteps) // (len(p.grid[0]) - 1), 1)
        generators: Any = None
        with torch.no_grad():
            for k, t in enumerate(scheduler.timesteps):
                if p.solver is None and (k % stride == 0 or generators is None):
                    seeds = self.rows.at(k // stride).integers("scheduler")
                    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
                options = {"generator": stream if p.solver is not None else generators} if takes_generator else {}
                seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(network(seen, t), t, x, **options, return_dict=False)[0]
        return x

    def _network(self, scheduler: Any) -> Any:
        """The call that a pipeline makes: the UNet itself where there is one, guided as the recipe says."""
        import torch

        from tasks import registry
        from tasks.checkpoint import UNetDenoiser
        from tasks.scheduler import Network, UnifiedScheduler

        if isinstance(self.model, UNetDenoiser):
            raw: Any = self.model.network
        else:
            p = self.p
            plan = None if p.solver is None else registry.solvers.build(p.solver).plan(p.process, p.grid[0])
            kind = scheduler.config.prediction_type if isinstance(scheduler, UnifiedScheduler) else prediction_of(p)
            raw = Network(self.model, kind, () if plan is None else [*plan.starts, *plan.times])
        guidance, labels = self.p.recipe.guidance, self.labels
        if guidance["name"] == "none":
            return lambda x, t: raw(x, t, labels).sample
        nothing = torch.full_like(labels, self.model.num_classes)

        def guided(x: Any, t: Any) -> Any:
            without = raw(x, t, nothing).sample
            return without + guidance["scale"] * (raw(x, t, labels).sample - without)

        return guided


class Stream:
    """Draws of one generator in the order in which they are asked for, as a pipeline's are."""

    def __init__(self, num_rows: int, device: str) -> None:
        import torch

        self.num_rows, self.device = num_rows, device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, shape: tuple[int, ...], purpose: str) -> Any:
        """Standard normal draws, (B, *shape)."""
        from diffusers.utils.torch_utils import randn_tensor

        return randn_tensor((self.num_rows, *shape), generator=self._generator, device=_device(self.device))

    def at(self, step: int) -> Stream:
        """The same: the order is all."""
        return self


def _device(name: str) -> Any:
    import torch

    return torch.device(name)


# --- the README ------------------------------------------------------------------------------------------------------


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
        f"{p.recipe.nfe} evaluations a sample. {warning}Checked: {_judged(found)}.\n\n"
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
