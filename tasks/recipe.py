"""Recipe: everything that determines the rows of a trial; and the keys under which rows and columns are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from tasks import registry
from tasks.registry import Spec, unknown

PLUGINS = ("model", "solver", "times", "guidance", "strategy", "reward")
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
    labels: str | int | None = "cycle"
    batch_size: int = 256
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A recipe with some values replaced.

        Args:
            changes: dotted paths to values: ``{"solver": "heun", "times.rho": 5.0}``. A plug-in's own name (or a whole
                spec) replaces it with that plug-in's defaults; ``nfe`` sets solver fields and the number of steps so
                that a trajectory costs exactly that many evaluations; list items are reached by number.

        Raises:
            ValueError: a path or a value that does not exist.
        """
        data = asdict(self)
        for path in sorted(changes, key=lambda p: (p.count("."), p == "nfe")):
            value, (head, *rest) = changes[path], path.split(".")
            if path == "nfe":
                continue
            if head not in data:
                raise unknown("override", path, [*PLUGINS, *PLAIN, "nfe"], "Allowed")
            if not rest:
                data[head] = _whole(head, value, data[head])
            else:
                if data[head] is None:
                    raise ValueError(f"{path} cannot be set: there is no {head}.")
                data[head] = _set(data[head], rest, value, path)
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
        return Parts(
            registry.models.build(self.model),
            registry.solvers.build(self.solver),
            registry.times.build(self.times),
            registry.guidance.build(self.guidance),
            registry.strategies.build(self.strategy),
            None if self.reward is None else registry.rewards.build(self.reward),
        )

    @cached_property
    def grid(self) -> tuple[tuple[float, ...], int | None]:
        """The times, and the number of steps given to a stock scheduler that lays its own grid (else None)."""
        p = self.parts
        if self.times["name"] == "stock":
            if not hasattr(p.solver, "grid"):
                raise ValueError(
                    f"times=stock is a stock scheduler's own grid, but the solver is {self.solver['name']}. Use "
                    "solver=diffusers or another grid."
                )
            return p.solver.grid(p.model.noising, p.times.num_steps), p.times.num_steps
        return p.times(p.model.noising), None

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
        grid, stock_steps = self.grid
        if stock_steps is None and not all(a > b for a, b in zip(grid, grid[1:], strict=False)):
            raise ValueError(f"times must decrease, got {list(grid)}. Use fewer steps or another grid.")
        if grid[0] > 1 or grid[-1] < 0:
            raise ValueError(f"times must lie in [0, 1], got {grid[0]} … {grid[-1]}.")
        if hasattr(p.solver, "check"):
            p.solver.check(process, stock_steps if stock_steps is not None else grid)
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
            p.reward.check(p.model.shape)
            if p.reward.needs_labels and not self.has_labels:
                raise ValueError(f"reward {self.reward['name']} needs labels, but this study has none.")  # type: ignore[index]
        if p.strategy.branches and not p.solver.stochastic:
            raise ValueError(
                f"strategy {self.strategy['name']} copies particles, but {solver} is deterministic: copies would stay "
                "identical. Use a stochastic solver, for example solver=ddim solver.eta=1."
            )

    def _check_labels(self) -> None:
        classes = self.parts.model.num_classes
        if isinstance(self.labels, bool) or not (self.labels in (None, "cycle") or isinstance(self.labels, int)):
            raise ValueError(f"labels must be cycle, null or a number, got {self.labels!r}.")
        if isinstance(self.labels, int) and not 0 <= self.labels < max(classes, 1):
            raise ValueError(f"labels must be below the model's {classes} classes, got {self.labels}.")
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

    @property
    def nfe(self) -> int:
        """Network evaluations that one sample costs, for strategies that spend evenly."""
        steps = self.grid[1] or len(self.grid[0]) - 1
        p = self.parts
        stops_early = self.grid[0][-1] > 0 and hasattr(p.solver, "nfe_before_data")
        spent = p.solver.nfe_before_data(steps) if stops_early else p.solver.nfe(steps)
        return spent * p.guidance.evaluations * p.strategy.particles

    @cached_property
    def key(self) -> str:
        """Content key of the rows: what determines them and nothing else.

        Times enter as their values, so equal grids made in different ways share rows. A reward enters only when the
        strategy looks at it. A checkpoint enters by the hash of its weights, not by its path.
        """
        grid, stock_steps = self.grid
        return digest(
            {
                "model": {k: v for k, v in self.model.items() if k != "path"},
                "revision": self.parts.model.revision,
                "solver": self.solver,
                "times": list(grid) if stock_steps is None else stock_steps,
                "guidance": self.guidance,
                "strategy": self.strategy,
                "reward": scorer_identity(self.reward) if self.parts.strategy.uses_reward else None,
                "labels": self.labels if self.parts.model.num_classes else None,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "numerics": f"{self.device}/{self.dtype}",
            }
        )

    def column_key(self, scorer: Spec) -> str:
        """Content key of one scorer's column over these rows."""
        return digest({"rows": self.key, "scorer": scorer_identity(scorer)})


@dataclass(frozen=True)
class Parts:
    """The plug-in objects of a recipe."""

    model: Any
    solver: Any
    times: Any
    guidance: Any
    strategy: Any
    reward: Any


def scorer_identity(spec: Spec | None) -> Any:
    """Spec and weights of a scorer: any change to what is measured misses the cache."""
    return None if spec is None else {"spec": spec, "revision": registry.scorer(spec).revision}


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
