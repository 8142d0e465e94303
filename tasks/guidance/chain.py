"""Several kinds of guidance together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tasks.branches import Branches
from tasks.registry import Spec, guidance
from tasks.rehearsal import per_call
from tasks.types import Model


@guidance.register("chain")
@dataclass(frozen=True)
class Chain:
    """Guidance on guidance: every part wraps the parts before it; what they have in common is evaluated once.

    Parts that change the network itself (skip_tuning and the savings) come first, whatever their place in the list:
    all others look at the changed network. Of these, the first guides the model and each further one adds its own
    direction to what it is given: ``[cfg, pag]`` is ``x0_u + w (x0_c - x0_u) + s (x0_c - x0_p)`` for three evaluations.

    Args:
        parts: specs of guidance. A list in a recipe's place of guidance means the same.

    Reference: Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", eq. 12 (sums).
    Cost: that of its parts, without repetitions.
    Identities: one part is that part; none is no guidance.
    """

    parts: tuple[Spec, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(guidance.complete(spec) for spec in self.parts))
        if any(getattr(plugin, "name", "") == "chain" for plugin in self.plugins):
            raise ValueError("guidance.parts holds a chain. List its parts instead.")
        names = [plugin.name for plugin in self.plugins]
        if "cfgpp" in names and names[-1] != "cfgpp":
            raise ValueError(f"cfgpp has two predictions, so it must be the last of guidance.parts, got {names}.")
        if "cfgpp" in names and self.follows_grid:
            raise ValueError("cfgpp cannot be combined with cfg_schedule in guidance.parts. Leave one of them out.")
        changing = [plugin.name for plugin in self.plugins if _edits(plugin)]
        by_labels = {plugin.name for plugin in self.plugins if getattr(plugin, "asks_unlabelled", False)}
        if self.remembers and (len(changing) > 1 or not {*names} - {*changing} <= by_labels or self.limited):
            fitting = [
                name for name in guidance.names() if getattr(guidance.get(name), "asks_unlabelled", False) is True
            ]
            raise ValueError(
                f"guidance.parts holds {changing[0]}, which follows an evaluation with labels and one without at every "
                f"step, so it can be combined with one of {', '.join(fitting)} on all steps alone, got "
                f"{', '.join(names)}."
            )

    @cached_property
    def plugins(self) -> tuple[Any, ...]:
        """The parts, innermost first."""
        return tuple(guidance.build(spec) for spec in self.specs)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Their specs, innermost first."""
        return tuple(sorted(self.parts, key=lambda spec: not _edits(guidance.get(spec["name"]))))

    def beside(self, model: Any) -> Chain:
        """Itself with parts that know the model."""
        found = copy.copy(self)
        found.__dict__["plugins"] = tuple(p.beside(model) if hasattr(p, "beside") else p for p in self.plugins)
        return found

    @property
    def decodes(self) -> bool:
        """Whether one of them looks at decoded predictions."""
        return any(getattr(plugin, "decodes", False) for plugin in self.plugins)

    @property
    def saves(self) -> bool:
        """Whether one of them spares evaluations or parts of them."""
        return any(getattr(plugin, "saves", False) for plugin in self.plugins)

    @property
    def evaluations(self) -> int:
        """Network evaluations of one call."""
        return per_call(self)[0]

    @property
    def needs_labels(self) -> bool:
        """Whether one of them does."""
        return any(plugin.needs_labels for plugin in self.plugins)

    @property
    def asks_unlabelled(self) -> bool:
        """Whether one of them does."""
        return any(getattr(plugin, "asks_unlabelled", False) for plugin in self.plugins)

    @property
    def limited(self) -> bool:
        """Whether one of them costs more at some steps than at others."""
        return any(getattr(plugin, "limited", False) for plugin in self.plugins)

    @property
    def follows_grid(self) -> bool:
        """Whether one of them differs from step to step."""
        return any(getattr(plugin, "follows_grid", False) for plugin in self.plugins)

    @property
    def remembers(self) -> bool:
        """Whether one of them keeps something from step to step."""
        return any(getattr(plugin, "remembers", False) for plugin in self.plugins)

    @property
    def differentiates(self) -> bool:
        """Whether evaluations have backward passes."""
        return any(getattr(plugin, "differentiates", False) for plugin in self.plugins)

    @property
    def revision(self) -> Any:
        """The revisions of parts that have one."""
        return [r for r in (getattr(plugin, "revision", None) for plugin in self.plugins) if r is not None] or None

    # A chain is calibrated part by part; the arrays of part i are named "i.name".

    @property
    def is_calibrated_here(self) -> bool:
        """Whether one of them has to look at the model first."""
        return any(hasattr(plugin, "calibrate") for plugin in self.plugins)

    artifact: ClassVar[str] = ""
    calibrated_on: ClassVar[tuple[str, ...]] = ("labels",)

    @property
    def calibration_revision(self) -> Any:
        """Those of the parts."""
        return [getattr(plugin, "calibration_revision", None) for plugin in self.plugins]

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        pairs = enumerate(self.plugins)
        return {f"{i}.{p.name}": p.calibration_fields() for i, p in pairs if hasattr(p, "calibrate")}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """What each part finds."""
        found: dict[str, np.ndarray] = {}
        for i, plugin in enumerate(self.plugins):
            if hasattr(plugin, "calibrate"):
                found |= {f"{i}.{name}": value for name, value in plugin.calibrate(bench).items()}
        return found

    def _given(self, i: int) -> Any:
        """Part i with what its calibration found."""
        arrays: dict[str, np.ndarray] = getattr(self, "calibrated", {})
        mine = {name.split(".", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{i}.")}
        if not mine:
            return self.plugins[i]
        part = copy.copy(self.plugins[i])
        object.__setattr__(part, "calibrated", mine)
        return part

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what one of them refuses, and a reward that needs labels where the next part asks without any.

        Raises:
            ValueError: its own, or says which order can be.
        """
        for i, plugin in enumerate(self.plugins):
            asking = [later.name for later in self.plugins[i + 1 :] if getattr(later, "asks_unlabelled", False)]
            if plugin.name == "reward_gradient" and plugin.differentiates and plugin.needs_labels and asking:
                raise ValueError(
                    f"guidance.parts has {asking[0]} after reward_gradient, which it asks for predictions without "
                    f"labels, but reward {plugin.reward['name']} needs them. Put reward_gradient last."
                )
        for plugin in self.plugins:
            if hasattr(plugin, "check_recipe"):
                plugin.check_recipe(recipe)

    def wrap(self, model: Model) -> Model:
        """The model within all parts."""
        found: Any = model
        for i, plugin in enumerate(self.plugins):
            if _edits(plugin):
                found = self._given(i).wrap(found)
        return _Chained(found, self, None, None) if self.follows_grid else self.directed(found, None, None)

    def directed(self, model: Any, times: tuple[float, ...] | None, step: int | None) -> Any:
        """A model within the parts that are directions: on a grid, and within one of its steps, for those that ask."""
        directions = [plugin for plugin in self.plugins if not _edits(plugin)]
        found = Branches(model) if len(directions) > 1 else model
        for plugin in directions:
            found = plugin.wrap(found)
            if times is not None and hasattr(type(found), "on_grid"):
                found = found.on_grid(times)
            if step is not None and hasattr(type(found), "at_step"):
                found = found.at_step(step)
        return found


def _edits(plugin: Any) -> bool:
    return getattr(plugin, "edits_network", False)


class _Chained:
    """A chain of which some part differs from step to step."""

    def __init__(self, model: Model, spec: Chain, times: tuple[float, ...] | None, step: int | None) -> None:
        self._parts = model, spec, times
        self._model = spec.directed(model, times, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def on_grid(self, times: tuple[float, ...]) -> _Chained:
        """The same on a grid."""
        return _Chained(*self._parts[:2], times, None)

    def at_step(self, step: int) -> _Chained:
        """The same within one step."""
        return _Chained(*self._parts, step)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        return self._model.denoise(x, t, cond)
