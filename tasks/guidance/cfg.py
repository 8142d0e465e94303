"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.coefficients import rho
from tasks.registry import guidance
from tasks.types import Model


@guidance.register("cfg")
@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: ``x0 = x0_u + scale (x0_c - x0_u)``, two evaluations per call.

    On tokens it is done with log-probabilities, ``p = p_u^(1 - scale) p_c^scale / Z`` for every token, which is the
    same extrapolation of the score of a discrete process.

    With scale=1 the mathematics is that of the conditional model and with scale=0 that of the unconditional one; both
    are still evaluated as two calls, so that the account stays the same along a sweep.

    With an interval, only noise levels ``sigma_low < sigma / alpha <= sigma_high`` are guided; elsewhere the
    conditional prediction is taken as it is.

    Args:
        scale: guidance scale w; 1 means no extrapolation.
        sigma_low: noise level sigma / alpha at and below which nothing is guided; null guides down to the data.
        sigma_high: noise level above which nothing is guided; null guides from pure noise on.

    Reference: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6 (their w is scale - 1); Kynkäänniemi et
        al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
        Models", eq. 5 (the interval); Schiff et al. 2025, "Simple Guidance Mechanisms for Discrete Diffusion Models",
        section 3.1 (tokens).
    Cost: two network evaluations per call, one outside of the interval.
    """

    scale: float = 1.5
    sigma_low: float | None = None
    sigma_high: float | None = None

    evaluations = 2
    needs_labels = True
    asks_unlabelled = True

    def __post_init__(self) -> None:
        for name in ("sigma_low", "sigma_high"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"guidance.{name} is a noise level sigma / alpha of at least 0, got {value}.")
        if self.sigma_low is not None and self.sigma_high is not None and self.sigma_low >= self.sigma_high:
            raise ValueError(
                f"guidance.sigma_low must be below guidance.sigma_high, got {self.sigma_low} and {self.sigma_high}. "
                "Use guidance=none to guide nothing."
            )

    @property
    def limited(self) -> bool:
        """Whether some noise levels are not guided."""
        return self.sigma_low is not None or self.sigma_high is not None

    def guides(self, process: Any, t: float) -> bool:
        """Whether the noise level at a time lies in the interval."""
        level = rho(process, t)
        low, high = self.sigma_low, self.sigma_high
        return (low is None or level > low) and (high is None or level <= high)

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: ClassifierFree) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        if cond is None:
            raise ValueError("classifier-free guidance needs labels, but this row has none. Set labels=cycle.")
        if self._spec.limited:
            if isinstance(t, Tensor) and t.ndim:
                inside = torch.tensor([self._spec.guides(self.process, float(s)) for s in t], device=x.device)
                conditional = self._model.denoise(x, t, cond).clone()
                if inside.any():
                    nothing = torch.full_like(cond[inside], self._model.num_classes)
                    without = self._model.denoise(x[inside], t[inside], nothing)
                    conditional[inside] = self._guided(without, conditional[inside])
                return conditional
            if not self._spec.guides(self.process, float(t)):
                return self._model.denoise(x, t, cond)
        unconditional = self._model.denoise(x, t, torch.full_like(cond, self._model.num_classes))
        conditional = self._model.denoise(x, t, cond)
        return self._guided(unconditional, conditional)

    def _guided(self, without: Tensor, conditional: Tensor) -> Tensor:
        if self.process.kind != "masked":
            return without + self._spec.scale * (conditional - without)
        # A floor instead of log 0: what both exclude stays excluded, what one of them excludes becomes very unlikely or
        # very likely, and is never NaN.
        log_u, log_c = (p.double().clamp_min(1e-30).log() for p in (without, conditional))
        guided = (log_u + self._spec.scale * (log_c - log_u)).softmax(-1)
        guided = guided.masked_fill((without == 0) & (conditional == 0), 0.0)
        return guided / guided.sum(-1, keepdim=True)
