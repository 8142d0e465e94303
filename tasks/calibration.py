"""Calibrations: what some plug-ins must find out about a model before they can sample.

A plug-in that needs one has ``calibrate(bench) -> arrays``, a field ``artifact`` (a file to use instead of
calibrating), a ``calibration_revision``, and ``calibrated_on``: the parts of the recipe, besides the model, that its
answer depends on. The artifact is kept under a key made of exactly these, so it is found again wherever they are equal,
and its cost is recorded.

Guidance comes first (a quantised network), then times, initial states, the solver with its hooks, and the strategy:
each may rely on those before.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tasks.noise import RowNoise
from tasks.sampler import CountedModel, Sampler
from tasks.types import sample_shape

if TYPE_CHECKING:
    from tasks.recipe import Recipe

Arrays = Mapping[str, np.ndarray]

# Calibrations use sample indices of their own, far from those of studies, so nothing is fitted on what it is judged by.
FIRST_INDEX = 3 * 2**30


@dataclass(frozen=True)
class Calibration:
    """One artifact that a recipe needs.

    Attributes:
        place: which plug-in: ``guidance``, ``times``, ``initial``, ``solver``, ``solver.hooks.N`` or ``strategy``.
        key: content key of the artifact.
        meta: what the key is made of; kept beside the artifact.
    """

    place: str
    key: str
    meta: dict[str, Any]


def needs_calibration(plugin: Any) -> bool:
    """Whether a plug-in has to look at the model first."""
    return hasattr(plugin, "calibrate") and getattr(plugin, "is_calibrated_here", True)


def places(parts: Any) -> list[tuple[str, Any]]:
    """The plug-ins that may need one, in the order in which they are calibrated."""
    hooks = getattr(parts.solver, "hook_objects", ())
    inner = [(f"solver.hooks.{i}", hook) for i, hook in enumerate(hooks)]
    before = [("guidance", parts.guidance), ("times", parts.times), ("initial", parts.initial)]
    before += [*inner, ("solver", parts.solver)]
    return [*before, ("strategy", parts.strategy)]


def of(recipe: Recipe) -> tuple[Calibration, ...]:
    """The artifacts that a recipe needs, in order.

    Raises:
        ValueError: an artifact file that is missing, damaged, or made for another model, revision or setting.
    """
    from tasks.recipe import digest
    from tasks.registry import identity, model_identity, to_data

    found = []
    for place, plugin in places(recipe.parts):
        if not needs_calibration(plugin):
            continue
        meta: dict[str, Any] = {
            "plugin": plugin.name,
            "fields": {k: to_data(v) for k, v in plugin.calibration_fields().items()},
            "code": plugin.calibration_revision,
            "model": model_identity(recipe.model),
            "revision": recipe.parts.model.revision,
        }
        for part in plugin.calibrated_on:
            value = getattr(recipe, part)
            value = identity(value) if part == "guidance" else value
            meta[part] = plugin.calibration_part(part, value) if hasattr(plugin, "calibration_part") else value
        if plugin.artifact:
            meta = _read(plugin.artifact, meta)[0]
            found.append(Calibration(place, f"file:{_sha(plugin.artifact)}", meta))
        else:
            found.append(Calibration(place, digest(meta), meta))
    return tuple(found)


def _sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]


def _read(path: str, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An artifact file: what it was made for, and its arrays.

    Raises:
        ValueError: not such a file, or made for something else.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get("solvus")
        arrays = load_file(path)
        meta = json.loads(text) if text else None
    except FileNotFoundError:
        raise ValueError(f"artifact {path!r} does not exist. Give a file made by `solvus export`.") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"artifact {path!r} cannot be read: {error}. Export it again.") from None
    if not isinstance(meta, dict) or "plugin" not in meta:
        raise ValueError(f"{path!r} is no Solvus artifact. Give a file made by `solvus export`.")
    for name in ("plugin", "model", "revision", "guidance"):
        if name in expected and meta.get(name) != expected[name]:
            raise ValueError(
                f"artifact {path!r} was made for {name} {meta.get(name)!r}, but this recipe has {expected[name]!r}. "
                "Leave the artifact out and it is calibrated anew."
            )
    return meta, arrays


def from_file(recipe: Recipe, calibration: Calibration) -> dict[str, np.ndarray]:
    """The arrays of an artifact that the recipe names a file for."""
    return _read(dict(places(recipe.parts))[calibration.place].artifact, calibration.meta)[1]


def save(path: Path, meta: Mapping[str, Any], arrays: Arrays) -> None:
    """Write an artifact to a file that ``artifact=FILE`` takes."""
    from safetensors.numpy import save_file

    kept = {name: np.array(value, order="C") for name, value in arrays.items()}
    save_file(kept, path, metadata={"solvus": json.dumps(meta, sort_keys=True)})


def bind(parts: Any, place: str, arrays: Arrays) -> Any:
    """The parts with one plug-in given its artifact, as its attribute ``calibrated``."""
    if place.startswith("solver.hooks."):
        solver, number = copy.copy(parts.solver), int(place.rsplit(".", 1)[1])
        hooks = list(solver.hook_objects)
        hooks[number] = _given(hooks[number], arrays)
        solver.__dict__["hook_objects"] = tuple(hooks)
        return replace(parts, solver=solver)
    return replace(parts, **{place: _given(getattr(parts, place), arrays)})


def _given(plugin: Any, arrays: Arrays) -> Any:
    bound = copy.copy(plugin)
    object.__setattr__(bound, "calibrated", dict(arrays))
    return bound


def bound(recipe: Recipe, artifacts: Mapping[str, Arrays]) -> Any:
    """The recipe's parts with every artifact in place."""
    parts = recipe.parts
    for calibration in recipe.calibrations:
        arrays = artifacts.get(calibration.key)
        if arrays is None and calibration.key.startswith("file:"):
            arrays = from_file(recipe, calibration)
        assert arrays is not None, f"artifact {calibration.key} of {calibration.place} was not made"
        parts = bind(parts, calibration.place, arrays_for(recipe, calibration, arrays))
    return parts


def arrays_for(recipe: Recipe, calibration: Calibration, arrays: Arrays) -> Arrays:
    """What a plug-in makes of an artifact that serves more than one recipe."""
    plugin = dict(places(recipe.parts))[calibration.place]
    return plugin.arrays_for(recipe, arrays) if hasattr(plugin, "arrays_for") else arrays


@dataclass
class Bench:
    """What a calibration may use: the guided, counted model, its data, and trajectories of its own.

    Attributes:
        recipe: the recipe; ``parts`` are its plug-ins with the artifacts that came before.
        model: the guided model.
        counted: the counter beneath it.
    """

    recipe: Recipe
    parts: Any
    model: Any
    counted: CountedModel

    @property
    def process(self) -> Any:
        """The noising process."""
        return self.model.process

    def noise(self, rows: int, first: int = 0) -> RowNoise:
        """The streams of some rows that no study uses."""
        indices = torch.arange(rows, device=self.recipe.device) + FIRST_INDEX + first
        return RowNoise(self.recipe.seed, indices, dtype=getattr(torch, self.recipe.dtype))

    def labels(self, rows: int, first: int = 0) -> Tensor | None:
        """Their labels, as the recipe gives them."""
        if not self.model.num_classes:
            return None
        found = [self.recipe.label(i) for i in range(first, first + rows)]
        return torch.tensor(found, device=self.recipe.device)

    def sampler(self, rows: int, first: int = 0, **changes: Any) -> Sampler:
        """A sampler of some rows; ``changes`` replace its fields (solver, times, initial)."""
        from tasks.recipe import grid_of

        if "times" not in changes:
            changes["times"], changes["stock_steps"] = grid_of(self.parts)
        fields = {"solver": self.parts.solver, "initial": self.parts.initial} | changes
        return Sampler(self.model, cond=self.labels(rows, first), **fields)

    def data(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Clean samples of the model's own data in its state's coordinates, and their labels; repeated as needed.

        Raises:
            ValueError: the model knows no data.
        """
        plugin = self.parts.model
        if not hasattr(plugin, "reference"):
            raise ValueError(f"model {plugin.name} has no reference data, which this calibration needs.")
        if sample_shape(plugin) != tuple(plugin.shape) and not hasattr(self.model, "encode"):
            raise ValueError(
                f"this calibration needs states, but the data of model {plugin.name} are what they decode to."
            )
        samples, labels = plugin.reference(rows)
        place = np.random.default_rng(0).permutation(len(samples))
        place = np.resize(place, rows)
        x0 = torch.as_tensor(np.asarray(samples[place]), device=self.recipe.device)
        if hasattr(self.model, "encode"):  # what is stored is not what is stepped
            x0 = self.model.encode(x0)
        elif plugin.noising.kind == "masked":
            x0 = x0.long()
        else:
            x0 = x0.to(getattr(torch, self.recipe.dtype)).reshape(rows, *self.model.shape)
        cond = torch.as_tensor(np.asarray(labels)[place], device=self.recipe.device) if self.model.num_classes else None
        return x0, cond


def make(recipe: Recipe, calibration: Calibration, parts: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Make one artifact.

    Args:
        recipe: what it is for.
        calibration: which.
        parts: the recipe's plug-ins with the artifacts that came before.

    Returns:
        its arrays, and its cost: network evaluations and seconds.

    Raises:
        ValueError: an answer that is not finite.
    """
    from tasks.run import load_model, use_one_thread

    use_one_thread()
    began = time.perf_counter()
    counted = CountedModel(load_model(recipe), recipe.batch_size)
    bench = Bench(recipe, parts, parts.guidance.wrap(counted), counted)
    with torch.no_grad():
        arrays = dict(places(parts))[calibration.place].calibrate(bench)
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise ValueError(f"the calibration of {calibration.place} gave {name} that is not finite.")
    cost = {"nfe": counted.rows, "generate_s": time.perf_counter() - began}
    return {name: np.asarray(value) for name, value in arrays.items()}, cost


# What was made in this process, by key: recipes that differ elsewhere share it.
_MADE: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
_MADE_LIMIT = 64


def make_all(recipe: Recipe) -> dict[str, dict[str, np.ndarray]]:
    """Every artifact of a recipe, made here and kept in memory: for use without a store."""
    found: dict[str, dict[str, np.ndarray]] = {}
    parts = recipe.parts
    for calibration in recipe.calibrations:
        if calibration.key in _MADE:
            arrays = _MADE[calibration.key]
        elif calibration.key.startswith("file:"):
            arrays = from_file(recipe, calibration)
        else:
            arrays = make(recipe, calibration, parts)[0]
        found[calibration.key] = _MADE[calibration.key] = arrays
        while len(_MADE) > _MADE_LIMIT:
            _MADE.popitem(last=False)
        parts = bind(parts, calibration.place, arrays_for(recipe, calibration, arrays))
    return found
