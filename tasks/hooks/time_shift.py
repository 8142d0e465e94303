"""Time-shift sampler: the time whose noise level the state really has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.registry import hooks, unknown


@hooks.register("time_shift")
@dataclass(frozen=True)
class TimeShift:
    """TS: each sample is taken to be at the time near t whose marginal variance matches its own pixel variance.

    ``t_s = argmin over tau in [t - w / 2, t + w / 2] of | var(x) - (alpha_tau^2 v0 + sigma_tau^2) |`` with var(x) the
    variance over the entries of one sample. Works against exposure bias: few-step samplers feed the network states that
    are not as noisy as it is told.

    Args:
        window: w, in training steps (thousandths of the time where there are none).
        cutoff: no shift at or below this many training steps (t_c).
        shift_applies_to: model_time tells the network t_s; start takes the state to be at t_s, moves it to t along its
            prediction and steps from there; target ends the step as far from s as t_s lies from t.
        v0: variance of clean data over the entries of a sample; 0 is the published rule, which overestimates t wherever
            the data are not constant.

    Reference: Li et al. 2024, "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps",
    algorithm 3. Windows and cut-offs are searched per sampler; the published ones: F-PNDM w=5 t_c=550, DPM-Solver w=30
    t_c=300, DEIS w=10 t_c=900, CIFAR in 5 steps w=80 t_c=300. Their code applies the shift in three places; all are
    here.
    Cost: none.
    Identities: with window=0 this is the solver without it.
    """

    window: float = 30.0
    cutoff: float = 300.0
    shift_applies_to: str = "model_time"
    v0: float = 0.0

    def __post_init__(self) -> None:
        allowed = ["model_time", "start", "target"]
        if self.shift_applies_to not in allowed:
            raise unknown("shift_applies_to", self.shift_applies_to, allowed, "Allowed")
        if self.window < 0 or self.v0 < 0:
            raise ValueError(f"time_shift.window and v0 must not be negative, got {self.window} and {self.v0}.")

    def begin(self, plan: Any) -> None:
        """The shifted times of the latest evaluation."""
        return None

    def _shifted(self, plan: Any, i: int, x: Tensor) -> Tensor | None:
        """t_s of every row, (B,) float64; None where nothing is shifted."""
        t, scale = plan.starts[i], 1.0 / getattr(plan.process, "num_train_steps", 1000)
        if self.window == 0 or t <= self.cutoff * scale or i == 0:
            return None
        nodes, variances = _candidates(plan.process, t, self.window * scale, scale, self.v0)
        variance = x.flatten(1).double().var(dim=1, unbiased=True)
        gaps = (variance[:, None] - torch.from_numpy(variances).to(x.device)[None]).abs()
        return torch.from_numpy(nodes).to(x.device)[gaps.argmin(dim=1)]

    def adapt_time(self, plan: Any, i: int, x: Tensor, t: Any, memory: Any) -> tuple[Any, Any]:
        """What the network is told."""
        shifted = self._shifted(plan, i, x)
        if shifted is None:
            return t, None
        return (shifted if self.shift_applies_to != "target" else t), shifted

    def transform_output(self, plan: Any, i: int, x: Tensor, x0: Tensor, t: Any, memory: Any) -> tuple[Tensor, Any]:
        """The clean prediction that the noise predicted at t_s means at the nominal time."""
        if memory is None or self.shift_applies_to != "model_time":
            return x0, memory
        wide = (-1, *[1] * (x.dim() - 1))
        alpha = plan.process.alpha(memory).to(x.dtype).view(wide)
        sigma = plan.process.sigma(memory).to(x.dtype).view(wide)
        eps = (x - alpha * x0) / sigma
        return (x - plan.sigma[i] * eps) / plan.alpha[i], memory

    def settle(self, plan: Any, i: int, x: Tensor, x0: Tensor, memory: Any) -> Tensor:
        """The state at the nominal time, for a state that was taken to be at t_s."""
        if memory is None or self.shift_applies_to != "start":
            return x
        wide = (-1, *[1] * (x.dim() - 1))
        alpha = plan.process.alpha(memory).to(x.dtype).view(wide)
        sigma = plan.process.sigma(memory).to(x.dtype).view(wide)
        return plan.alpha[i] * x0 + plan.sigma[i] * (x - alpha * x0) / sigma

    def land(self, plan: Any, i: int, x: Tensor, entries: Any, memory: Any) -> tuple[Tensor, Any]:
        """The end of the step, moved along the prediction by as much as t_s lies from t."""
        end = plan.times[i + 1]
        if memory is None or self.shift_applies_to != "target" or plan.process.sigma(end) == 0:
            return x, memory
        target = (end + (memory - plan.starts[i])).clamp(plan.process.t_min, 1.0)
        wide = (-1, *[1] * (x.dim() - 1))
        alpha = plan.process.alpha(target).to(x.dtype).view(wide)
        sigma = plan.process.sigma(target).to(x.dtype).view(wide)
        x0 = entries[0].x0
        eps = (x - plan.process.alpha(end) * x0) / plan.process.sigma(end)
        return alpha * x0 + sigma * eps, memory


@lru_cache(maxsize=512)
def _candidates(process: Any, t: float, window: float, scale: float, v0: float) -> tuple[np.ndarray, np.ndarray]:
    """The times that are looked at, a training step apart, and their marginal variances."""
    half = int(round(window / scale / 2))
    nodes = t + scale * np.arange(-half, half + 1)
    nodes = nodes[(nodes >= process.t_min) & (nodes <= 1.0)]
    alpha, sigma = process.alpha(torch.from_numpy(nodes)).numpy(), process.sigma(torch.from_numpy(nodes)).numpy()
    return nodes, alpha**2 * v0 + sigma**2
