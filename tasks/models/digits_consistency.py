"""The embedded consistency model of handwritten digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.checkpoint import WEIGHTS, Checkpoint, FolderModel, UNetDenoiser, digits_reference
from tasks.processes import Time, expand
from tasks.registry import models


@models.register("digits_consistency")
@dataclass(frozen=True)
class DigitsConsistency(FolderModel):
    """The embedded consistency model distilled from ``digits`` (``solvus train digits_consistency``).

    ``f(x, t) = c_skip y + c_out F(x, t)`` in ``y = x / alpha`` and ``u = sigma / alpha``, with
    ``c_skip = d^2 / ((u - u_min)^2 + d^2)`` and ``c_out = (u - u_min) d / sqrt(u^2 + d^2)``: the identity at ``t_min``,
    and the end of the probability-flow trajectory through (x, t) everywhere else. It is not a posterior mean, so it
    needs a few-step solver: consistency, ctm, tcd or lcm.

    Args:
        path: another folder with the same kind of model; null takes the one that comes with Solvus.

    Reference: Song et al. 2023, "Consistency Models", appendix C (c_skip, c_out), in the coordinates of Karras et al.
        2022, eq. 4.
    """

    path: str | None = None

    gives = ("flow_end",)

    def __post_init__(self) -> None:
        _ = self.sigma_data

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The folder, checked."""
        return Checkpoint(Path(self.path) if self.path else WEIGHTS / "digits_consistency")

    @property
    def sigma_data(self) -> float:
        """d: the standard deviation of the data that the network was distilled with."""
        found = self.checkpoint.scheduler.get("sigma_data")
        if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
            raise ValueError(
                f"model.path {self.path!r} has sigma_data={found!r} in its scheduler configuration; a consistency model "
                "needs a number above 0 there. Give a folder made by solvus train digits_consistency, or use "
                "model=digits for a diffusion model."
            )
        return float(found)

    def load(self, device: str) -> ConsistencyDenoiser:
        """The consistency function on a device."""
        return ConsistencyDenoiser(self.checkpoint, device, self.sigma_data)

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()


def coefficients(process: Any, t: Time, sigma_data: float) -> tuple[Any, Any]:
    """(a, b) of ``f = a x + b F(x, t)``: float64 numbers, or (B,) tensors for a time a row.

    Multiplied out to ``a = alpha d^2 / ((sigma - u_min alpha)^2 + (alpha d)^2)`` and likewise for b, which no division
    by alpha can spoil. Below ``t_min`` the identity goes on, so that the function is defined down to the data.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    least = process.sigma(process.t_min) / process.alpha(process.t_min)
    above = sigma - least * alpha
    above = above.clamp(min=0.0) if isinstance(above, Tensor) else max(above, 0.0)
    root = torch.sqrt if isinstance(above, Tensor) else math.sqrt
    skip = alpha * sigma_data**2 / (above**2 + (alpha * sigma_data) ** 2)
    return skip, above * sigma_data / root(sigma**2 + (alpha * sigma_data) ** 2)


class ConsistencyDenoiser(UNetDenoiser):
    """A UNet2DModel as a consistency function: its answer is the end of the flow, not a posterior mean."""

    def __init__(self, checkpoint: Checkpoint, device: str, sigma_data: float) -> None:
        super().__init__(checkpoint, device)
        self.sigma_data = sigma_data

    @torch.no_grad()
    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """f(x, t), (B, C, H, W). ``cond`` holds labels; ``num_classes`` or None means none."""
        if cond is None:
            cond = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
        time = torch.zeros(len(x), dtype=torch.float32, device=x.device) + self.process.model_time(t)
        output = self.network(x.float(), time.float(), cond if self.num_classes else None).sample.to(x.dtype)
        skip, out = coefficients(self.process, t, self.sigma_data)
        return expand(skip, x) * x + expand(out, x) * output
