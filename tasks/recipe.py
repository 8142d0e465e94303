"""Recipe: everything that determines the rows of a trial; and the keys under which rows and columns are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from tasks import account, calibration, registry
from tasks.account import Account
from tasks.calibration import Calibration
from tasks.overrides import PLUGINS, overridden
from tasks.prompted import reading, texts_of
from tasks.registry import Spec
from tasks.rehearsal import per_call, rehearse


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
        return Recipe(**overridden(asdict(self), changes)).completed()

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
            _beside(registry.solvers.build(self.solver), model),
            registry.times.build(self.times),
            registry.initials.build(self.initial),
            _beside(registry.guidance.build(self.guidance), model),
            registry.strategies.build(self.strategy),
            None if self.reward is None else reading(registry.rewards.build(self.reward), texts_of(model)),
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The model's prompts by label; none where it has none."""
        return texts_of(self.parts.model)

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
        from tasks import refusals  # which reads recipes

        refusals.check(self)

    @property
    def masks(self) -> tuple[int, ...]:
        """Which blocks of the network each step leaves out, as bit masks; empty where none leaves any out."""
        found = tuple(step.skip for step in getattr(self.parts.solver, "records", None) or ())
        return found if any(found) else ()

    @property
    def weighs(self) -> bool:
        """Whether an evaluation may be less work than the whole network."""
        whole = self.parts.guidance
        plugins = (*getattr(whole, "plugins", (whole,)), *getattr(self.parts.solver, "hook_objects", ()))
        return bool(self.masks) or any(getattr(p, "saves", False) or getattr(p, "weighs", False) for p in plugins)

    @property
    def is_limited(self) -> bool:
        """Whether guidance costs more at some noise levels than at others."""
        return getattr(self.parts.guidance, "limited", False)

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
        if self.is_limited and not getattr(p.solver, "adaptive", False):
            first, *others = (n for n, *_ in rehearse(p.model, _bare(p.solver), p.guidance, grid, stock_steps))
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
        if getattr(self.parts.guidance, "decodes", False):
            evaluations, decodes = self._decoding
            found = replace(found, decodes=found.decodes + -(-found.nfe * decodes // evaluations))
        saves = getattr(solver, "saves", False)
        saves = saves or any(getattr(hook, "saves", False) for hook in getattr(solver, "hook_objects", ()))
        return replace(found, exact=False) if saves or getattr(solver, "adaptive", False) else found

    @property
    def _decoding(self) -> tuple[int, int]:
        """Evaluations of the network, and how often guidance decodes in them: of a call, or else of a trajectory."""
        p, (grid, stock_steps) = self.parts, self.grid
        if not self.is_limited or getattr(p.solver, "adaptive", False):
            return per_call(p.guidance)
        steps = rehearse(p.model, _bare(p.solver), p.guidance, grid, stock_steps)
        return sum(count for count, *_ in steps), sum(decodes for *_, decodes in steps)

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
        return self.nfe - p.strategy.particles * sum(count - share for count, share, _ in steps)

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
        if hasattr(self.parts.solver, "inherited"):
            said = self.parts.solver.inherited(lays_grid=stock_steps is not None)
            said |= {} if stock_steps is None else self.parts.solver.handed(self.parts.model.noising, stock_steps)
            more |= {"scheduler": said} if said else {}
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


def _beside(plugin: Any, model: Any) -> Any:
    """A plug-in that knows the model it works on, where it asks for that."""
    return plugin.beside(model) if hasattr(plugin, "beside") else plugin


def _said(spec: Spec) -> Spec:
    said = {key: value for key, value in spec.items() if key not in ("path", "pinned")}
    return said | ({"rewards": [_said(part) for part in spec["rewards"]]} if "rewards" in spec else {})


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
