"""DPM-OT: a semi-discrete optimal transport map from the prior to noised data, in front of any solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.registry import initials
from tasks.types import Noise

_FALL = 1 / 300  # of the learning rate over a fit
_ROUND = 80  # iterations whose mean is judged together


@initials.register("dpm_ot")
@dataclass(frozen=True)
class DPMOT:
    """DPM-OT expressway: a draw of the prior goes to the noised datum of its transport cell; the solver starts there.

    The cell of z is ``argmax_i <z, y_i> + h_i``; the heights h minimise a convex energy whose gradient is the cell's
    measure minus 1 / N, so that every datum (of a class, where rows have labels) is used equally often. Sampling then
    begins at the level to which the data were noised. Outputs descend from stored data: judge them with a measure of
    diversity or memorisation too.

    Args:
        level: noise level sigma / alpha to which the data are noised (M).
        num_targets: number of data N.
        num_draws: prior draws of one estimate of the cells' measures; eight such batches are walked through.
        learning_rate: Adam's, in standard deviations of the scores; it falls geometrically.
        num_iterations: Adam's.
        tolerance: it stops when the gradient's norm over all draws is below this and no cell is empty.
        neighbours: cells that are blended; 1 takes the cell's own datum, k averages the k highest planes, weighted by
            how near they come.
        max_angle: planes whose normals differ by more than this many degrees from the highest's are not blended, so
            that modes do not mix.
        artifact: file with targets and heights made before.

    Reference: Li et al. 2023, "DPM-OT: A New Diffusion Probabilistic Model Based on Optimal Transport", algorithms 1
    and 2. Their code draws the source uniformly; the prior itself is used here.
    Cost: none when sampling (one matrix product); memory of num_targets states.
    """

    level: float = 1.0
    num_targets: int = 512
    num_draws: int = 8192
    learning_rate: float = 0.03
    num_iterations: int = 400
    tolerance: float = 8e-4
    neighbours: int = 1
    max_angle: float = 20.0
    artifact: str = ""

    evaluations = 0
    calibrated_on: ClassVar[tuple[str, ...]] = ("labels", "seed")
    calibration_revision: ClassVar[str] = "2"

    def __post_init__(self) -> None:
        if self.level <= 0 or min(self.num_targets, self.num_draws, self.num_iterations, self.neighbours) < 1:
            raise ValueError(
                "dpm_ot needs level > 0 and num_targets, num_draws, num_iterations and neighbours of at least 1, got "
                f"{self.level}, {self.num_targets}, {self.num_draws}, {self.num_iterations} and {self.neighbours}."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        names = ("level", "num_targets", "num_draws", "learning_rate", "num_iterations", "tolerance")
        return {name: getattr(self, name) for name in names}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """Targets (N, D), their labels (N,), heights (N,), and the last gradient's norm.

        Where rows have labels the cells are those of each class by itself.

        Raises:
            ValueError: a class without a datum.
        """
        x0, cond = bench.data(self.num_targets)
        noise = bench.noise(self.num_targets)
        y = (x0 + self.level * noise.normal(tuple(x0.shape[1:]), purpose="targets")).flatten(1)
        labels = torch.zeros(len(y), dtype=torch.int64, device=y.device) if cond is None else cond
        groups = [torch.arange(len(y), device=y.device)]
        if bench.recipe.has_labels:
            groups = [(labels == k).nonzero()[:, 0] for k in range(bench.model.num_classes)]
            if min(map(len, groups)) == 0:
                raise ValueError(
                    f"dpm_ot drew no datum of class {min(range(len(groups)), key=lambda k: len(groups[k]))} among "
                    f"{len(y)}. Raise num_targets."
                )
        # A pool of draws, walked through batch by batch; bounded for states of many dimensions.
        count = max(1, min(8, 2**27 // (self.num_draws * y.shape[1])))
        pool = bench.noise(count * self.num_draws, first=len(y)).normal((y.shape[1],), purpose="source").float()
        heights, square = torch.zeros(len(y), dtype=torch.float64, device=y.device), 0.0
        for group in groups:
            size = max(min(1024, self.num_draws), self.num_draws * len(group) // len(y))
            heights[group], norm = self._fit(y[group].float(), pool.split(size)[:count])
            square += norm**2
        return {
            "targets": y.float().cpu().numpy(),
            "heights": heights.cpu().numpy(),
            "labels": labels.cpu().numpy().astype(np.int64),
            "gradient_norm": np.array([math.sqrt(square)]),
        }

    def _fit(self, y: Tensor, batches: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Heights (N,) of targets (N, D) by Adam over batches of the prior, and the gradient's norm over all of them.

        The beginning is the optimal map between Gaussians, ``-|y - m|^2 / (2 s)``, times the factor that is best (less
        in many dimensions, where a few targets lie far apart). The rate falls geometrically, and the mean of the last
        iterates counts: single ones follow their batch.
        """

        def gradient(h: Tensor, draws: Tensor) -> Tensor:
            cell = torch.addmm(h.float(), draws, y.T).argmax(dim=1)
            return torch.bincount(cell, minlength=len(y)).double() / len(draws) - 1.0 / len(y)

        if len(y) == 1:
            return torch.zeros(1, dtype=torch.float64, device=y.device), 0.0
        centred = (y - y.mean(0)).double()
        bowl = -centred.square().sum(1) / (2 * centred.square().mean().sqrt())
        begun = [factor * bowl for factor in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)]
        heights = min(begun, key=lambda h: float(gradient(h, batches[0]).norm()))
        unit = float((batches[0] @ y.T).std())  # of a height: a standard deviation of the scores
        first, second = torch.zeros_like(heights), torch.zeros_like(heights)
        best, norm = heights, math.inf
        mean, weight = torch.zeros_like(heights), 0
        for k in range(1, self.num_iterations + 1):
            slope = gradient(heights, batches[k % len(batches)])
            first = 0.9 * first + 0.1 * slope
            second = 0.99 * second + 0.01 * slope.square()
            step = (first / (1 - 0.9**k)) / ((second / (1 - 0.99**k)).sqrt() + 1e-3 / len(y))
            rate = self.learning_rate * _FALL ** (k / self.num_iterations)
            heights = heights - rate * unit * step
            heights = heights - heights.mean()
            mean, weight = mean + heights, weight + 1
            if k % _ROUND == 0 or k == self.num_iterations:
                slopes = torch.stack([gradient(mean / weight, draws) for draws in batches]).mean(0)
                if float(slopes.norm()) < norm:
                    best, norm = mean / weight, float(slopes.norm())
                mean, weight = torch.zeros_like(heights), 0
                if norm < self.tolerance and bool((slopes > -1.0 / len(y)).all()):
                    break
        return best, norm

    def start(self, process: Any) -> float:
        """The time of the level."""
        return process.time(-math.log(self.level))

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) states at the first time of the grid."""
        calibrated: dict[str, np.ndarray] = self.calibrated  # type: ignore[attr-defined]
        z = noise.normal(sampler.model.shape, purpose="prior")
        y = torch.from_numpy(calibrated["targets"]).to(z.device).double()
        scores = z.flatten(1).double() @ y.T + torch.from_numpy(calibrated["heights"]).to(z.device)
        if sampler.cond is not None:
            # A row takes the cell of a datum of its own class.
            labels = torch.from_numpy(calibrated["labels"]).to(z.device)
            fits = (labels[None] == sampler.cond[:, None]) | (sampler.cond == sampler.model.num_classes)[:, None]
            scores = torch.where(fits, scores, torch.full_like(scores, -torch.inf))
        values, index = scores.topk(min(self.neighbours, len(y)), dim=1)
        chosen = y[index]  # (B, k, D)
        normal = torch.cat([chosen, -torch.ones_like(chosen[..., :1])], dim=-1)
        normal = normal / normal.norm(dim=-1, keepdim=True)
        near = (normal * normal[:, :1]).sum(-1) >= math.cos(math.radians(self.max_angle))
        near[:, 0] = True
        weights = torch.softmax(torch.where(near, values - values[:, :1], torch.full_like(values, -torch.inf)), dim=1)
        state = (weights[..., None] * chosen).sum(1).reshape(z.shape).to(z.dtype)
        return sampler.model.process.alpha(sampler.times[0]) * state
