"""Autoguidance: away from a bad version of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tasks.branches import around
from tasks.registry import Spec, guidance, models
from tasks.types import Model


@guidance.register("autoguidance")
@dataclass(frozen=True)
class Autoguidance:
    """Autoguidance: ``x0 = x0 + (scale - 1) (x0_c - x0_bad)`` with a worse version of the same model.

    On the plain model this is ``x0_bad + scale (x0_c - x0_bad)``. The bad version sees the same state and labels: it is
    an earlier or smaller checkpoint (``bad``), or the network without some of its blocks (``skip``).

    Args:
        scale: guidance scale w; 1 leaves the bad version out and is the model itself.
        bad: spec of the bad model, such as ``{name: unet, path: FOLDER}``; of the same process, shape and labels.
        skip: where ``bad`` is null, bit b leaves out block b of the network (as ``skip`` of a schedule's step).

    Reference: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself", eq. 3.
    Cost: two network evaluations per call, one with scale=1; ``work`` counts the bad version by its multiply-adds where
        blocks are left out, and as a whole network otherwise.
    Identities: with scale=1 the model itself; with a bad version that is as good, the model itself up to rounding.
    """

    scale: float = 2.0
    bad: dict[str, Any] | None = None
    skip: int = 1

    needs_labels = False

    @property
    def touches_layers(self) -> bool:
        """Whether the bad version is the network without some of its blocks."""
        return self.bad is None

    @property
    def weighs(self) -> bool:
        """Whether that is less work than an evaluation."""
        return self.bad is None

    def __post_init__(self) -> None:
        if self.bad is None and self.skip < 1:
            raise ValueError(
                f"autoguidance needs a bad version of the model, got bad=null and skip={self.skip}. Set guidance.bad "
                "to a model's spec, or guidance.skip to a mask of blocks that are left out."
            )
        if self.bad is not None:
            object.__setattr__(self, "bad", models.complete(self.bad))

    @property
    def evaluations(self) -> int:
        """Of one call."""
        return 1 if self.scale == 1.0 else 2

    @cached_property
    def model(self) -> Any:
        """The bad model's plug-in; None where blocks are left out."""
        return None if self.bad is None else models.build(self.bad)

    @property
    def revision(self) -> str | None:
        """That of the bad model, which determines the rows too."""
        return None if self.model is None else self.model.revision

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a bad version that cannot stand beside the model.

        Raises:
            ValueError: another process, shape or number of labels; or blocks that the network does not have.
        """
        good, name = recipe.parts.model, f"model {recipe.model['name']}"
        if good.noising.kind != "gaussian":
            raise ValueError(f"guidance autoguidance extrapolates predictions of Gaussian models, but {name} is not.")
        if self.model is None:
            if getattr(good, "blocks", None) is None:
                raise ValueError(
                    f"guidance.skip leaves out blocks of a network, but {name} has none. Set guidance.bad instead."
                )
            good.blocks.check(self.skip, name)
            return
        mine, its = (getattr(getattr(model, "prompt_table", None), "digest", None) for model in (good, self.model))
        if mine != its:
            raise ValueError(
                f"autoguidance tells both versions of {name} the same prompts, but those of guidance.bad are others. "
                f"Set guidance.bad.prompts={getattr(good, 'prompts', None)}."
            )
        for what in ("noising", "shape", "num_classes"):
            mine, its = getattr(good, what), getattr(self.model, what)
            if mine != its:
                what = "process" if what == "noising" else what
                raise ValueError(
                    f"autoguidance needs a bad version of {name} itself, but guidance.bad has {what} {its} where "
                    f"the model has {mine}. Give a checkpoint of the same kind."
                )

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: Autoguidance) -> None:
        self._model, self._branches = around(model)
        self._spec = spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        found = self._model.denoise(x, t, cond)
        if self._spec.scale == 1.0:
            return found
        plain = self._branches.denoise(x, t, cond)
        kind = f"bad {self._spec.bad} {self._spec.skip}"
        return found + (self._spec.scale - 1.0) * (plain - self._branches.ask(kind, self._bad, x, t, cond))

    def _bad(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        if self._spec.bad is None:
            with self._model.skipping(self._spec.skip):  # type: ignore[attr-defined]
                return self._branches.beneath.denoise(x, t, cond)
        if getattr(self._model, "is_rehearsal", False):
            return self._branches.beneath.denoise(x, t, cond)
        return self._model.other(_loaded(self._spec.bad, x.device.type).denoise, x, t, cond)  # type: ignore[attr-defined]


def _loaded(spec: Spec | None, device: str) -> Model:
    from tasks.recipe import canonical
    from tasks.run import load

    return load(canonical(spec), device)
