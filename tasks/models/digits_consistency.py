"""The embedded consistency model of handwritten digits."""

from __future__ import annotations

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

    ``f(x, t) = c (y - (u - u_min) e) + (1 - c) g`` in ``y = x / alpha`` and ``u = sigma / alpha``, with
    ``c = d^2 / ((u - u_min)^2 + d^2)`` and a network of two outputs: e, the teacher's prediction of the noise, which
    rules near the data, and g, a clean image, which rules where u is large. At ``t_min`` it is the identity, and
    everywhere else the end of the probability-flow trajectory through (x, t): not a posterior mean, so it needs a
    few-step solver (consistency, ctm, tcd, lcm).

    Args:
        path: another folder with the same kind of model; null takes the one that comes with Solvus.

    Reference: Song et al. 2023, "Consistency Models", appendix C (c_skip and the boundary); Salimans and Ho 2022,
        "Progressive Distillation", appendix D (both outputs).
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
        found, outputs = self.checkpoint.scheduler.get("sigma_data"), self.checkpoint.config.get("out_channels")
        if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0 or outputs != 2:
            raise ValueError(
                f"model.path {self.path!r} has sigma_data={found!r} in its scheduler configuration and "
                f"{outputs} output channels; a consistency model has a number above 0 and 2. Give a folder made by "
                "solvus train digits_consistency, or use model=digits for a diffusion model."
            )
        return float(found)

    def load(self, device: str) -> ConsistencyDenoiser:
        """The consistency function on a device."""
        return ConsistencyDenoiser(self.checkpoint, device, self.sigma_data)

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All 1,797 digits and their labels."""
        return digits_reference()


def coefficients(process: Any, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of x, e and g in f, for times (B,): float64, (B,) each.

    Multiplied out so that nothing is divided by alpha. Below ``t_min`` the identity goes on, down to the data.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    above = (sigma - alpha * process.sigma(process.t_min) / process.alpha(process.t_min)).clamp(min=0.0)
    signal = alpha * sigma_data**2
    total = above**2 + alpha * signal
    return signal / total, -signal * above / total, above**2 / total


def consistency(network: Any, process: Any, sigma_data: float, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """f(x, t), (B, 1, H, W), for times (B,)."""
    output = network(x.float(), process.model_time(t).float(), labels).sample.to(x.dtype)
    carry, eps, clean = (expand(factor, x) for factor in coefficients(process, t, sigma_data))
    return carry * x + eps * output[:, :1] + clean * output[:, 1:]


class ConsistencyDenoiser(UNetDenoiser):
    """A UNet2DModel as a consistency function: its answer is the end of the flow, not a posterior mean."""

    def __init__(self, checkpoint: Checkpoint, device: str, sigma_data: float) -> None:
        super().__init__(checkpoint, device)
        self.sigma_data = sigma_data

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """f(x, t), (B, C, H, W). ``cond`` holds labels; ``num_classes`` or None means none."""
        if cond is None:
            cond = torch.full((len(x),), self.num_classes, dtype=torch.int64, device=x.device)
        times = torch.zeros(len(x), dtype=torch.float64, device=x.device) + t
        return consistency(self.network, self.process, self.sigma_data, x, times, cond)
