"""How far a schedule ends from the truth on one-dimensional problems whose denoiser is known.

A network is not needed to see that a schedule is unstable or coarse where it matters. The probes run it on a handful of
Gaussians, ``E[x0 | x] = alpha v x / (alpha^2 v + sigma^2)``, and symmetric pairs of Gaussians, ``m tanh(alpha m x / q)
+ (alpha v / q) (x - alpha m tanh(...))`` with ``q = alpha^2 v + sigma^2``, all in one row and in float64. The log
errors against the same problems solved finely are features from which a model of quality ranks unseen schedules; what
they mean for the study's own model is learned from its trials.

Reference: none; the idea is that of a test equation in the analysis of ODE solvers. Wang and Vastola 2024 show how near
real diffusion models are to Gaussian ones at high noise.
Cost: no evaluation of the network; a few milliseconds a schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.schedule_space import ScheduleSpace
from tasks import registry
from tasks.noise import RowNoise
from tasks.processes import lam_range, times_from_lam
from tasks.sampler import Sampler

VARIANCES = (0.003, 0.03, 0.1, 0.3, 1.0)
PAIRS = ((1.0, 0.05), (0.5, 0.1), (1.0, 0.4))  # half the distance of the two means, standard deviation of both
QUANTILES = (0.1, 0.3, 0.7, 1.1, 1.7)  # starts of the pairs, in standard deviations
FLOOR, CEILING = 1e-6, 1e3
FINE_STEPS = 256


class Problems:
    """The denoiser of all problems at once: column i of the state belongs to problem i."""

    def __init__(self, process: Any) -> None:
        self.process = process
        pairs = [(m, s * s) for m, s in PAIRS for _ in QUANTILES]
        self._mean = torch.tensor([0.0] * len(VARIANCES) + [m for m, _ in pairs], dtype=torch.float64)
        self._variance = torch.tensor([*VARIANCES, *(v for _, v in pairs)], dtype=torch.float64)
        self.shape = (len(self._mean),)

    def first(self, t: float) -> Tensor:
        """Where the problems begin at time t, (1, D)."""
        spread = self.process.alpha(t) ** 2 * (self._variance + self._mean**2) + self.process.sigma(t) ** 2
        at = torch.tensor([1.0] * len(VARIANCES) + list(QUANTILES) * len(PAIRS), dtype=torch.float64)
        return (at * spread.sqrt())[None]

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t = x], (1, D)."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        q = alpha**2 * self._variance + sigma**2
        centre = self._mean * torch.tanh(alpha * self._mean * x / q)
        return centre + alpha * self._variance / q * (x - alpha * centre)


class Probes:
    """Features of schedules: the log errors on every problem.

    Args:
        space: the schedules' space; its process and first time are those of the problems.
    """

    def __init__(self, space: ScheduleSpace) -> None:
        self._model = Problems(space.process)
        lams = np.linspace(*lam_range(space.process, space.start), FINE_STEPS)
        times = times_from_lam(space.process, space.start, lams)
        fine = registry.solvers.build({"name": "unified", "preset": "dpmpp_2m"})
        self._truth = self._end(fine, times)

    def _end(self, solver: Any, times: tuple[float, ...]) -> Tensor:
        noise: Any = RowNoise(0, torch.zeros(1, dtype=torch.int64), dtype=torch.float64)
        sampler = Sampler(self._model, solver, times)  # type: ignore[arg-type]
        state = replace(sampler.start(noise), x=self._model.first(times[0]))
        for _ in range(sampler.num_steps):
            state = sampler.step(state, noise)
        return state.x[0]

    def __call__(self, schedule: Mapping[str, Any]) -> list[float]:
        """The features of a schedule as data: one of every Gaussian, root mean square and median of every pair."""
        steps = [{name: value for name, value in step.items() if name != "skip"} for step in schedule["steps"]]
        solver = registry.solvers.build({"name": "unified", "steps": steps})
        error = (self._end(solver, tuple(schedule["times"])) - self._truth).abs()
        # A schedule that blows up is a bad one, not an unknown one: the predictor sees the largest error.
        error = torch.nan_to_num(error, nan=CEILING, posinf=CEILING).clamp(FLOOR, CEILING)
        single, pairs = error[: len(VARIANCES)], error[len(VARIANCES) :].reshape(len(PAIRS), len(QUANTILES))
        found = [single / torch.tensor(VARIANCES, dtype=torch.float64).sqrt(), pairs.square().mean(1).sqrt()]
        return torch.cat([*found, pairs.median(1).values]).log().tolist()
