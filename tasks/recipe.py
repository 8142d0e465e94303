"""Recipe: everything that determines the rows of a trial; and the keys under which rows and columns are stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from tasks import account, calibration, registry
from tasks.account import Account
from tasks.calibration import Calibration
from tasks.prompted import reading
from tasks.registry import Spec, unknown
from tasks.rehearsal import rehearse
from tasks.schedule import SolverSchedule
from tasks.types import sample_shape

PLUGINS = ("model", "solver", "times", "initial", "guidance", "strategy", "reward")
PLAIN = ("labels", "batch_size", "seed", "dtype", "device")


def canonical(data: Any) -> str:
    """The one JSON text of plain data, the same on every machine."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """Content key of plain data: 32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Recipe:
    """How one sample is made, as plain JSON data. The sample count is no part of it.

    Attributes:
        model, solver, times, guidance, strategy: specs of plug-ins.
        initial: spec of what begins the trajectories.
        reward: spec of the reward that the strategy may use, or None.
        labels: "cycle" gives row i the label i mod num_classes; a number gives every row that label; None gives none.
        batch_size: rows of one network call. Part of the recipe, because the last bits of a network's answer depend on
            it; rows are laid out by index, so nothing else about batching matters.
        seed: the study's seed.
        dtype: float32 or float64, of states.
        device: "cpu" or "cuda".
    """

    model: Spec
    solver: Spec
    times: Spec
    guidance: Spec
    strategy: Spec
    reward: Spec | None = None
    initial: Spec = field(default_factory=lambda: {"name": "prior"})
    labels: str | int | None = "cycle"
    batch_size: int = 256
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A recipe with some values replaced.

        Args:
            changes: dotted paths to values: ``{"solver": "heun", "times.rho": 5.0}``. A plug-in's own name (or a whole
                spec) replaces it with that plug-in's defaults; ``schedule`` (a SolverSchedule as data) sets
                solver and times; ``prompts`` (a file) is the model's; ``nfe`` sets solver fields and the number of
                steps so that a trajectory costs exactly that many evaluations; list items are reached by number.

        Raises:
            ValueError: a path or a value that does not exist.
        """
        data = asdict(self)
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
        return Recipe(**data).completed()

    def completed(self) -> Recipe:
        """With every spec filled in and checked."""
        specs: dict[str, Any] = {
            kind: registry.ALL[kind].complete(getattr(self, kind))
            for kind in PLUGINS
            if kind != "reward" or self.reward is not None
        }
        return replace(self, **specs)

    @cached_property
    def parts(self) -> Parts:
        """The plug-in objects, without weights."""
        model = registry.models.build(self.model)
        return Parts(
            model,
            registry.solvers.build(self.solver),
            registry.times.build(self.times),
            registry.initials.build(self.initial),
            registry.guidance.build(self.guidance),
            registry.strategies.build(self.strategy),
            None if self.reward is None else reading(registry.rewards.build(self.reward), _texts(model)),
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The model's prompts by label; none where it has none."""
        return _texts(self.parts.model)

    def scorer(self, spec: Spec) -> Any:
        """A reward or feature extractor that knows the model's prompts."""
        return reading(registry.scorer(spec), self.texts)

    @cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """The artifacts that must be made before the rows, in order."""
        return calibration.of(self)

    @cached_property
    def grid(self) -> tuple[tuple[float, ...], int | None]:
        """The times, and the number of steps given to a stock scheduler that lays its own grid (else None).

        Where the times themselves are calibrated they are not known yet: then a uniform grid of as many steps stands
            in.
        """
        if self.has_calibrated_times:
            start = self.parts.initial.start(self.parts.model.noising)
            steps = self.parts.times.num_steps
            return tuple(start * (1.0 - i / steps) for i in range(steps)) + (0.0,), None
        return grid_of(self.parts)

    @property
    def has_calibrated_times(self) -> bool:
        """Whether the grid is found by looking at the model."""
        return any(c.place == "times" for c in self.calibrations)

    def check(self) -> None:
        """Refuse what cannot run, before any work starts.

        Raises:
            ValueError: says what is wrong, what is allowed and what to do.
        """
        p, solver = self.parts, self.solver["name"]
        process = p.model.noising
        if p.solver.process != process.kind:
            fitting = [n for n in registry.solvers.names() if _process(n) == process.kind]
            raise ValueError(
                f"solver {solver} steps {p.solver.process} processes, but model {self.model['name']} is "
                f"{process.kind}. Choose one of: {', '.join(fitting)}."
            )
        self._check_pairings()
        if hasattr(p.model, "check_recipe"):
            p.model.check_recipe(self)
        grid, stock_steps = self.grid
        travels = getattr(p.times, "travels", False)
        if stock_steps is None and not travels and not all(a > b for a, b in zip(grid, grid[1:], strict=False)):
            raise ValueError(f"times must decrease, got {list(grid)}. Use fewer steps or another grid.")
        if min(grid) < 0 or max(grid) > 1:
            raise ValueError(f"times must lie in [0, 1], got {list(grid)}.")
        start = p.initial.start(process)
        begins_elsewhere = self.initial["name"] != "prior" and not math.isclose(grid[0], start, rel_tol=1e-9)
        if stock_steps is None and begins_elsewhere:
            raise ValueError(
                f"the grid begins at t={grid[0]:.6g}, but initial {self.initial['name']} begins at {start:.6g}. "
                "Let the first time be that one, or use a grid that is laid from it, such as times=uniform."
            )
        if stock_steps is not None and start != 1.0:
            raise ValueError(
                f"a stock scheduler's own grid begins at pure noise, but initial {self.initial['name']} begins at "
                f"t={start:.4g}. Use another grid than times=stock."
            )
        if hasattr(p.solver, "check"):
            for first, last in segments(grid) if stock_steps is None else [(0, 0)]:
                p.solver.check(process, stock_steps if stock_steps is not None else grid[first : last + 1])
        for name, number in (("batch_size", self.batch_size), ("seed", self.seed)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise ValueError(f"{name} must be a whole number, got {number!r}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2^63 - 1, got {self.seed}.")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        self._check_labels()
        if p.strategy.uses_reward:
            if p.reward is None:
                raise ValueError(f"strategy {self.strategy['name']} needs a reward. Set reward=NAME.")
            p.reward.check(sample_shape(p.model))
            if hasattr(p.reward, "check_model"):
                p.reward.check_model(p.model)
            if p.reward.needs_labels and not self.has_labels:
                raise ValueError(f"reward {self.reward['name']} needs labels, but this study has none.")  # type: ignore[index]
            if hasattr(p.reward, "at") and not getattr(p.reward, "by_prompt", False) and self.has_labels:
                raise ValueError(
                    f"reward {self.reward['name']} measures item i in row i, whose label asks for another class. Set "  # type: ignore[index]
                    "labels=null."
                )
        self._check_strategy()
        if p.strategy.branches and not p.solver.stochastic:
            instead = "solver=ancestral" if p.model.noising.kind == "masked" else "solver=ddim solver.eta=1"
            raise ValueError(
                f"strategy {self.strategy['name']} copies particles, but {solver} is deterministic: copies would stay "
                f"identical. Use a stochastic solver, for example {instead}."
            )
        if p.strategy.branches and getattr(p.solver, "window", None) is not None:
            raise ValueError(
                f"strategy {self.strategy['name']} copies particles, and copies stay identical in the steps of "
                f"{solver} outside solver.window={list(p.solver.window)}: it needs every step to be stochastic. Set "
                "solver.window=null."
            )
        if hasattr(p.strategy, "check_recipe"):
            p.strategy.check_recipe(self)
        adaptive = self.solver["name"] if getattr(p.solver, "adaptive", False) else ""
        account.check_budget(self.strategy["name"], p.strategy.budget, self.account, adaptive)

    def _check_pairings(self) -> None:
        """Refuse a model, solver, times or initial state that do not belong together."""
        p, process = self.parts, self.parts.model.noising
        studied = [("times", p.times, "uniform")] if hasattr(p.times, "calibrate") else []
        studied += [("initial", p.initial, "prior")] if self.initial["name"] not in ("prior", "shared_noise") else []
        for kind, plugin, instead in studied:
            if getattr(plugin, "process", "gaussian") != process.kind:
                raise ValueError(
                    f"{kind} {plugin.name} is made for {getattr(plugin, 'process', 'gaussian')} processes, but model "
                    f"{self.model['name']} is {process.kind}. Use {kind}={instead}."
                )
        needed, given = getattr(p.solver, "needs", "posterior_mean"), getattr(p.model, "gives", ("posterior_mean",))
        if needed not in given:
            fitting = [n for n in registry.solvers.names() if _needs(n) in given and _process(n) == process.kind]
            raise ValueError(
                f"solver {self.solver['name']} needs a model that gives its {_GIVES[needed]}, but model "
                f"{self.model['name']} gives {' and '.join(_GIVES[g] for g in given)}. Solvers that fit: "
                f"{', '.join(fitting)}."
            )
        if needed != "posterior_mean" and "flow_map" in given and self.guidance["name"] != "none":
            raise ValueError(
                f"guidance {self.guidance['name']} cannot guide the exact flow map that solver {self.solver['name']} "
                "uses. Use guidance=none, or a model that was distilled with guidance."
            )
        noisy = [f"solver {self.solver['name']}"] if p.solver.stochastic else []
        noisy += [f"times {self.times['name']}"] if getattr(p.times, "travels", False) else []
        noisy += [f"initial {self.initial['name']}"] if self.initial["name"] not in ("prior", "shared_noise") else []
        if not getattr(process, "stochastic_ok", True) and noisy:
            raise ValueError(
                f"{type(process).__name__} is sampled by its ODE from its own prior alone, but {noisy[0]} draws "
                "Gaussian noise. Choose a deterministic solver and initial=prior."
            )
        if getattr(p.times, "travels", False) and not getattr(p.solver, "restarts", True):
            raise ValueError(
                f"times {self.times['name']} jump back, but solver {self.solver['name']} lays its own course. "
                "Use one of Solvus's solvers."
            )
        self._check_skip()
        self._check_interval()
        for _, plugin in calibration.places(p):
            if hasattr(plugin, "check_recipe"):
                plugin.check_recipe(self)

    @property
    def masks(self) -> tuple[int, ...]:
        """Which blocks of the network each step leaves out, as bit masks; empty where none leaves any out."""
        found = tuple(step.skip for step in getattr(self.parts.solver, "records", None) or ())
        return found if any(found) else ()

    def _check_skip(self) -> None:
        """Refuse steps that leave out blocks which the network does not have."""
        if not self.masks:
            return
        model = f"model {self.model['name']}"
        if getattr(self.parts.model, "blocks", None) is None:
            raise ValueError(
                f"the schedule leaves out blocks of the network (skip={max(self.masks)}), but {model} has none. "
                "Set skip to 0, or use a model that is a network, such as digits."
            )
        for mask in self.masks:
            self.parts.model.blocks.check(mask, model)
        if self.strategy["name"] not in ("single", "best_of_n"):  # others evaluate the network outside of the steps
            raise ValueError(
                f"the schedule leaves out blocks of the network, which strategy {self.strategy['name']} cannot. Use "
                "strategy=single or best_of_n."
            )

    def _check_interval(self) -> None:
        """Refuse guidance whose cost differs from step to step where that could not be planned."""
        if not self._is_limited:
            return
        p = self.parts
        obstacles = (
            (p.model.noising.kind != "gaussian", f"model {self.model['name']} has no noise levels sigma / alpha"),
            (self.has_calibrated_times, f"times {self.times['name']} are not known before their calibration"),
            (calibration.needs_calibration(p.solver), f"solver {self.solver['name']} needs a calibration first"),
            (p.initial.evaluations > 0, f"initial {self.initial['name']} evaluates the network at levels of its own"),
        )
        for stands, why in obstacles:
            if stands:
                raise ValueError(
                    f"guidance {self.guidance['name']} costs more at some noise levels than at others, but {why}, so "
                    "its cost cannot be planned. Guide every level alike, or use another one."
                )

    @property
    def _is_limited(self) -> bool:
        return getattr(self.parts.guidance, "limited", False)

    def _check_strategy(self) -> None:
        """Refuse a strategy that the other parts cannot serve."""
        p = self.parts
        if getattr(p.strategy, "intermediate", False) and not getattr(p.reward, "scores_predictions", True):
            raise ValueError(
                f"strategy {self.strategy['name']} judges unfinished samples (as predicted or as they are), but reward "
                f"{self.reward['name'] if self.reward else None} cannot score these. Use another reward, or "
                "strategy=best_of_n."
            )
        if hasattr(p.strategy, "check_recipe"):
            p.strategy.check_recipe(self)

    def _check_labels(self) -> None:
        classes = self.parts.model.num_classes
        if isinstance(self.labels, bool) or not (self.labels in (None, "cycle") or isinstance(self.labels, int)):
            raise ValueError(f"labels must be cycle, null or a number, got {self.labels!r}.")
        if isinstance(self.labels, int) and not 0 <= self.labels < max(classes, 1):
            raise ValueError(f"labels must be below the model's {classes} classes, got {self.labels}.")
        if getattr(self.parts.model, "needs_labels", False) and not self.has_labels:
            raise ValueError(f"model {self.model['name']} needs a label for every row. Set labels=cycle.")
        if self.parts.guidance.needs_labels and getattr(self.parts.model, "needs_labels", False):
            raise ValueError(
                f"model {self.model['name']} has no unconditional prediction, so guidance {self.guidance['name']} "
                "cannot be used. Use guidance=none."
            )
        if self.parts.guidance.needs_labels and not self.has_labels:
            raise ValueError(
                f"guidance {self.guidance['name']} needs labels, but "
                + ("labels is null." if classes else f"model {self.model['name']} has none.")
                + " Use guidance=none."
            )

    @property
    def has_labels(self) -> bool:
        """Whether rows carry a label."""
        return self.labels is not None and self.parts.model.num_classes > 0

    def label(self, index: int) -> int:
        """The label of row ``index`` (num_classes when it has none)."""
        classes = self.parts.model.num_classes
        if not self.has_labels:
            return classes
        return index % classes if self.labels == "cycle" else int(self.labels)  # type: ignore[arg-type]

    @cached_property
    def evaluations(self) -> tuple[int, ...]:
        """Network evaluations of every step of one trajectory, guidance included.

        What the initial state takes is part of the first step; a step in which the grid rises takes none.
        """
        grid, stock_steps = self.grid
        p = self.parts
        aside = getattr(p.initial, "side_evaluations", 0)  # those that guidance does not act on
        if self._is_limited and not getattr(p.solver, "adaptive", False):
            first, *others = (n for n, _ in rehearse(p.model, _bare(p.solver), p.guidance, grid, stock_steps))
            return (first + aside, *others)
        spent: list[int] = []
        for first, last in segments(grid) if stock_steps is None else [(0, stock_steps)]:
            spent += [0] * (first > 0)
            # A solver with a memory starts afresh where the grid rose; one without knows the number of its step only.
            begin = first if hasattr(p.solver, "start") else 0
            run = account.steps(p.solver, last - begin, stock_steps is not None or grid[last] == 0)
            spent += run[first - begin :]
        spent[0] += p.initial.evaluations
        found = [p.guidance.evaluations * each for each in spent]
        return (found[0] + aside, *found[1:])

    @cached_property
    def account(self) -> Account:
        """What one sample is planned to cost.

        Where it is not exact, the numbers are upper bounds of a strategy that decides as it goes or of a solver that
        saves evaluations, or the lower bound of a solver that chooses its own steps; the rows know what they cost.
        """
        found, solver = self.parts.strategy.account(self.evaluations), self.parts.solver
        if getattr(self.parts.guidance, "differentiates", False):
            found = replace(found, gradients=max(found.gradients, found.nfe))
        saves = getattr(solver, "saves", False)
        saves = saves or any(getattr(hook, "saves", False) for hook in getattr(solver, "hook_objects", ()))
        return replace(found, exact=False) if saves or getattr(solver, "adaptive", False) else found

    @property
    def nfe(self) -> int:
        """Planned network evaluations of one sample."""
        return self.account.nfe

    @property
    def work(self) -> float:
        """The same, with each evaluation weighted by the share of the network's multiply-adds that its step leaves."""
        if not self.masks:
            return float(self.nfe)
        p, (grid, stock_steps) = self.parts, self.grid
        steps = rehearse(p.model, _bare(p.solver), p.guidance, grid, stock_steps)
        return self.nfe - p.strategy.particles * sum(count - share for count, share in steps)

    @cached_property
    def key(self) -> str:
        """Content key of the rows: what determines them and nothing else.

        Times enter as their values, so equal grids made in different ways share rows. A reward enters only when the
        strategy looks at it. A checkpoint enters by the hash of its weights, not by its path; those that a
        strategy brings along enter by its ``revision``.
        """
        grid, stock_steps = self.grid
        more: dict[str, Any] = {}
        if self.initial != {"name": "prior"}:
            more["initial"] = self.initial
        if self.calibrations:
            more["artifacts"] = [c.key for c in self.calibrations]
            more["calibrated_times"] = self.times if self.has_calibrated_times else None
        if getattr(self.parts.strategy, "revision", None) is not None:
            more["strategy_revision"] = self.parts.strategy.revision
        if getattr(self.parts.initial, "revision", None) is not None:
            more["initial_revision"] = self.parts.initial.revision
        if getattr(self.parts.guidance, "revision", None) is not None:
            more["guidance_revision"] = self.parts.guidance.revision
        return digest(
            more
            | {
                "model": registry.model_identity(self.model),
                "revision": self.parts.model.revision,
                "solver": self.solver,
                "times": list(grid) if stock_steps is None else stock_steps,
                "guidance": registry.identity(self.guidance),
                "strategy": self.strategy | {"budget": self._budget},
                "reward": scorer_identity(self.reward) if self.parts.strategy.uses_reward else None,
                "labels": self.labels if self.parts.model.num_classes else None,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "numerics": f"{self.device}/{self.dtype}",
            }
        )

    @property
    def _budget(self) -> dict[str, float]:
        """The caps that the strategy adapts to; others refuse a recipe, and change no row."""
        return {k: v for k, v in self.parts.strategy.budget.items() if k in getattr(self.parts.strategy, "adapts", ())}

    def companion(self, scorer: Spec) -> Recipe | None:
        """The recipe whose rows of the same indices a scorer compares these rows with; None where it needs no others.

        Raises:
            ValueError: the two cannot be compared row by row.
        """
        plugin = registry.scorer(scorer)
        return plugin.companion(self) if hasattr(plugin, "companion") else None

    def column_key(self, scorer: Spec) -> str:
        """Content key of one scorer's column over these rows, and over their companions where it has some."""
        other = self.companion(scorer)
        more = {} if other is None else {"companion": other.key}
        return digest(more | {"rows": self.key, "scorer": scorer_identity(scorer)})


@dataclass(frozen=True)
class Parts:
    """The plug-in objects of a recipe."""

    model: Any
    solver: Any
    times: Any
    initial: Any
    guidance: Any
    strategy: Any
    reward: Any


def scorer_identity(spec: Spec | None) -> Any:
    """Spec and weights of a scorer: any change to what is measured misses the cache.

    Where the weights lie does not matter, so ``path`` and ``pinned`` are left out; the revision holds their hash. The
    model's prompts are no part of it: what is scored has a key that holds them.
    """
    return None if spec is None else {"spec": _said(spec), "revision": registry.scorer(spec).revision}


def _said(spec: Spec) -> Spec:
    said = {key: value for key, value in spec.items() if key not in ("path", "pinned")}
    return said | ({"rewards": [_said(part) for part in spec["rewards"]]} if "rewards" in spec else {})


def _texts(model: Any) -> tuple[str, ...]:
    return tuple(model.prompt_table.texts) if hasattr(model, "prompt_table") else ()


_GIVES = {
    "posterior_mean": "posterior mean",
    "flow_end": "trajectory's end (a consistency model)",
    "flow_map": "flow map",
    "energy_log_prob": "log-probability of whole strings",
}


def _bare(solver: Any) -> Any:
    """A solver without the hooks that need a calibration: they change no evaluation."""
    hooks = getattr(solver, "hook_objects", ())
    if not any(calibration.needs_calibration(hook) for hook in hooks):
        return solver
    kept = tuple(
        spec for spec, hook in zip(solver.hooks, hooks, strict=True) if not calibration.needs_calibration(hook)
    )
    return replace(solver, hooks=kept)


def segments(grid: tuple[float, ...]) -> list[tuple[int, int]]:
    """The falling stretches of a grid: (first, last) node of each; between two of them the state is noised again."""
    cuts = [i for i in range(1, len(grid)) if grid[i] > grid[i - 1]]
    return list(zip([0, *cuts], [*(c - 1 for c in cuts), len(grid) - 1], strict=True))


def grid_of(parts: Parts) -> tuple[tuple[float, ...], int | None]:
    """The times of some plug-ins, and the number of steps given to a stock scheduler that lays its own grid."""
    process = parts.model.noising
    if parts.times.name == "stock":
        if not hasattr(parts.solver, "grid"):
            raise ValueError(
                f"times=stock is a stock scheduler's own grid, but the solver is {parts.solver.name}. Use "
                "solver=diffusers or another grid."
            )
        return parts.solver.grid(process, parts.times.num_steps), parts.times.num_steps
    return parts.times(process, parts.initial.start(process)), None


def _needs(solver: str) -> str:
    return getattr(registry.solvers.get(solver), "needs", "posterior_mean")


def _process(solver: str) -> str:
    """The kind of process that a registered solver can step."""
    cls: Any = registry.solvers.get(solver)
    return cls.process


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
