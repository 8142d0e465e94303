"""Several kinds of guidance together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tasks.branches import Branches
from tasks.registry import Spec, guidance
from tasks.rehearsal import evaluations_per_call
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
        names = [plugin.name for plugin in self.plugins]
        if "chain" in names:
            raise ValueError("guidance.parts holds a chain. List its parts instead.")
        if "cfgpp" in names and names[-1] != "cfgpp":
            raise ValueError(f"cfgpp has two predictions, so it must be the last of guidance.parts, got {names}.")
        if "cfgpp" in names and self.follows_grid:
            raise ValueError("cfgpp cannot be combined with cfg_schedule in guidance.parts. Leave one of them out.")
        remembering = [plugin.name for plugin in self.plugins if getattr(plugin, "remembers", False)]
        if len(remembering) > 1:
            raise ValueError(f"guidance.parts can hold one of these savings at a time, got {', '.join(remembering)}.")

    @cached_property
    def plugins(self) -> tuple[Any, ...]:
        """The parts, innermost first."""
        built = [guidance.build(spec) for spec in self.parts]
        return tuple(sorted(built, key=lambda plugin: not _edits(plugin)))

    @property
    def evaluations(self) -> int:
        """Network evaluations of one call."""
        return evaluations_per_call(self)

    @property
    def needs_labels(self) -> bool:
        """Whether one of them does."""
        return any(plugin.needs_labels for plugin in self.plugins)

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

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what one of them refuses.

        Raises:
            ValueError: its own.
        """
        for plugin in self.plugins:
            if hasattr(plugin, "check_recipe"):
                plugin.check_recipe(recipe)

    def wrap(self, model: Model) -> Model:
        """The model within all parts."""
        found: Any = model
        for plugin in self.plugins:
            if _edits(plugin):
                found = plugin.wrap(found)
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
