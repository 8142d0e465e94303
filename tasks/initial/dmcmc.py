"""Denoising MCMC: a Langevin-Gibbs chain over states and noise levels, in front of any solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.processes import expand
from tasks.registry import initials, unknown
from tasks.statistics import gaussian_statistics, log_density, pick
from tasks.types import Noise


@initials.register("dmcmc")
@dataclass(frozen=True)
class DenoisingMCMC:
    """Denoising Langevin-Gibbs: every row runs a chain over (x, level) and begins its trajectory where that ends.

    In y = x / alpha and rho = sigma / alpha: ``y <- y + (eta / 2) rho^2 score + sqrt(eta) rho z`` moves the state at
    its level, and ``rho ~ p(rho | y)`` draws a new level. Most of the time is spent at low levels, so few steps of a
    solver are left. The level's law takes the data's Gaussian for p(y | rho), where the paper trains a classifier. A
    chain that ends below the level at which solvers start is noised up to it, which is exact; one above is brought down
    by one step.

    Args:
        num_moves: moves of a chain, one evaluation each.
        eta: step size in units of rho^2. The paper's constant 0.8 is in pixels squared; relative steps suit any level.
        level: noise level sigma / alpha at which the solver takes over.
        low: lowest level; levels are equally likely in their logarithm.
        high: highest level.
        num_levels: levels that are told apart.
        select: last keeps the chain's law; min takes the cleanest state visited, as published, which favours modes that
            are left with little noise (a biased choice).
        rank: leading principal directions of the data; null keeps all.
        num_data: samples from which the data's Gaussian is taken.
        artifact: file with statistics made before.

    Reference: Kim and Ye 2023, "Denoising MCMC for Accelerating Diffusion-Based Generative Models", algorithm 1.
    Cost: num_moves evaluations a sample before the solver's own.
    """

    num_moves: int = 10
    eta: float = 0.5
    level: float = 0.5
    low: float = 0.05
    high: float = 20.0
    num_levels: int = 200
    select: str = "last"
    rank: int | None = None
    num_data: int = 10000
    artifact: str = ""

    calibrated_on: ClassVar[tuple[str, ...]] = ()
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.select not in ("last", "min"):
            raise unknown("select", self.select, ["last", "min"], "Allowed")
        if not 0 < self.low < self.high or not 0 < self.eta <= 2 or self.num_moves < 1 or self.level <= 0:
            raise ValueError(
                "dmcmc needs 0 < low < high, 0 < eta <= 2, num_moves >= 1 and level > 0, got "
                f"{self.low}, {self.high}, {self.eta}, {self.num_moves} and {self.level}."
            )

    @property
    def evaluations(self) -> int:
        """One a move, and one to bring a chain down to the level."""
        return self.num_moves + 1

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {"rank": self.rank, "num_data": self.num_data}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """Mean, eigenvectors and eigenvalues of the data."""
        x0, cond = bench.data(self.num_data)
        return gaussian_statistics(x0, cond, bench.model.num_classes, self.rank)

    def start(self, process: Any) -> float:
        """The time of the level at which the solver takes over."""
        return process.time(-math.log(self.level))

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) states at the first time of the grid."""
        process, model, shape = sampler.model.process, sampler.model, sampler.model.shape
        levels = np.exp(np.linspace(math.log(self.low), math.log(self.high), self.num_levels))
        levels = levels[levels <= _highest(process)]
        rho_of = torch.from_numpy(levels).to(noise.device)  # type: ignore[attr-defined]
        z = noise.normal(shape, purpose="prior")
        chosen = pick(self.calibrated, sampler.cond, z)  # type: ignore[attr-defined]
        rho = rho_of[-1].expand(len(z)).clone()  # every chain begins at the highest level
        y = rho[-1] * z
        y = y + chosen["mean"].reshape(-1, *shape).to(y.dtype)
        best_y, best_rho = y, rho
        for k in range(self.num_moves):
            t = process.time(-rho.log())
            alpha, wide = expand(process.alpha(t), y), expand(rho, y)
            x0 = model.denoise(alpha * y, t, sampler.cond)
            fresh = noise.at(k).normal(shape, purpose="chain")
            # rho^2 times the score of y is x0 - y.
            y = y + (0.5 * self.eta) * (x0 - y) + math.sqrt(self.eta) * wide * fresh
            logits = log_density(y.flatten(1), rho_of[None].expand(len(y), -1), chosen)
            draw = noise.at(k).uniform((1,), purpose="level")
            cumulative = torch.softmax(logits, dim=1).cumsum(1)
            index = (cumulative <= draw * cumulative[:, -1:]).sum(1).clamp(max=len(levels) - 1)
            rho = rho_of[index]
            lower = rho < best_rho
            best_y = torch.where(expand(lower.double(), y) > 0, y, best_y)
            best_rho = torch.where(lower, rho, best_rho)
        if self.select == "min":
            y, rho = best_y, best_rho
        # Up to the level by noise, down by one first-order step; the network is asked for all rows, so that a row's
        # cost and bits do not depend on its neighbours.
        target = torch.full_like(rho, self.level)
        t = process.time(-rho.log())
        x0 = model.denoise(expand(process.alpha(t), y) * y, t, sampler.cond)
        down = x0 + expand(target / rho, y) * (y - x0)
        extra = (target.square() - rho.square()).clamp(min=0.0).sqrt()
        up = y + expand(extra, y) * noise.normal(shape, purpose="level-noise")
        y = torch.where(expand((rho > target).double(), y) > 0, down, up)
        return process.alpha(sampler.times[0]) * y


def _highest(process: Any) -> float:
    """The highest noise level of a process; beyond it there is no time."""
    start = 1.0 if math.isfinite(process.lam(1.0)) else 1.0 - process.t_min
    return math.exp(-process.lam(start))
