"""Classifier-free guidance whose prediction keeps the spread of the conditional one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.branches import unconditional
from tasks.processes import expand, from_x0, to_x0
from tasks.registry import guidance, unknown
from tasks.types import Model

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


@guidance.register("rescaled_cfg")
@dataclass(frozen=True)
class RescaledCFG:
    """Rescaled guidance: the guided prediction is shrunk to the standard deviation of the conditional one.

    ``y = rescale (std(y_c) / std(y_g)) y_g + (1 - rescale) y_g`` with ``y_g = y_u + scale (y_c - y_u)``, the standard
    deviation taken over one sample, and y the prediction that the network makes.

    Args:
        scale: guidance scale w.
        rescale: phi, 0 to 1; 0 is plain guidance.
        prediction: epsilon, sample, v_prediction or flow: what y is; null takes the network's own, and v_prediction
            for models that are no network.

    Reference: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4, eq. 14-16.
    Cost: two network evaluations per call.
    Identities: with rescale=0 ``cfg``; with scale=1 the conditional model, up to rounding.
    """

    scale: float = 2.0
    rescale: float = 0.7
    prediction: str | None = None

    evaluations = 2
    needs_labels = True
    asks_unlabelled = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"guidance.rescale must be between 0 and 1, got {self.rescale}.")
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            raise unknown("guidance.prediction", self.prediction, list(PREDICTIONS), "Allowed")

    def check_recipe(self, recipe: Any) -> None:
        """Refuse processes that have no such predictions.

        Raises:
            ValueError: the model is not Gaussian.
        """
        if recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(
                f"guidance rescaled_cfg compares standard deviations, but model {recipe.model['name']} is not "
                "Gaussian. Use guidance=cfg."
            )

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: RescaledCFG) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        spec = self._spec
        without = self._model.denoise(x, t, unconditional(self._model, cond, "rescaled_cfg"))
        conditional = self._model.denoise(x, t, cond)
        guided = without + spec.scale * (conditional - without)
        if not spec.rescale:
            return guided
        kind: Any = spec.prediction or getattr(self._model, "prediction", "v_prediction")
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        y, like = (from_x0(kind, x, x0, alpha, sigma) for x0 in (guided, conditional))
        axes = list(range(1, x.dim()))
        spread, aim = (z.std(dim=axes, keepdim=True) if z[0].numel() > 1 else z.abs() for z in (y, like))
        ratio = torch.where(spread > 0, aim / spread.clamp_min(torch.finfo(y.dtype).tiny), torch.ones_like(spread))
        return to_x0(kind, x, (spec.rescale * ratio + (1.0 - spec.rescale)) * y, alpha, sigma)
