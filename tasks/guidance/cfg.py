"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.registry import guidance
from tasks.types import Model


@guidance.register("cfg")
@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: ``x0 = x0_u + scale (x0_c - x0_u)``, two evaluations per call.

    With scale=1 the mathematics is that of the conditional model and with scale=0 that of the unconditional one; both
    are still evaluated as two calls, so that the account stays the same along a sweep.

    Args:
        scale: guidance scale w; 1 means no extrapolation.

    Reference: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 (their w is scale - 1).
    Cost: two network evaluations per call.
    """

    scale: float = 1.5

    evaluations = 2
    needs_labels = True

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self.scale)


class _Guided:
    def __init__(self, model: Model, scale: float) -> None:
        self._model, self._scale = model, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError("classifier-free guidance needs labels, but this row has none. Set labels=cycle.")
        unconditional = self._model.denoise(x, t, torch.full_like(cond, self._model.num_classes))
        conditional = self._model.denoise(x, t, cond)
        return unconditional + self._scale * (conditional - unconditional)
