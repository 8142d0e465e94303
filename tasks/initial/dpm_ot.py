"""DPM-OT: a semi-discrete optimal transport map from the prior to noised data, in front of any solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.registry import initials
from tasks.types import Noise


@initials.register("dpm_ot")
@dataclass(frozen=True)
class DPMOT:
    """DPM-OT expressway: a draw of the prior goes to the noised datum of its transport cell; the solver starts there.

    The cell of z is ``argmax_i <z, y_i> + h_i``; the heights h minimise a convex energy whose gradient is the cell's
    measure minus 1 / N, so that every datum is used equally often. Sampling then begins at the level to which the data
    were noised. Outputs descend from stored data: judge them with a measure of diversity or memorisation too.

    Args:
        level: noise level sigma / alpha to which the data are noised (M).
        num_targets: number of data N.
        num_draws: prior draws of one estimate of the cells' measures.
        learning_rate, num_iterations, tolerance: Adam's; it stops when the gradient's norm is below the tolerance and
            no cell is empty.
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
    num_targets: int = 1024
    num_draws: int = 20000
    learning_rate: float = 0.01
    num_iterations: int = 1500
    tolerance: float = 8e-4
    neighbours: int = 1
    max_angle: float = 20.0
    artifact: str = ""

    evaluations = 0
    calibrated_on: ClassVar[tuple[str, ...]] = ("seed",)
    calibration_revision: ClassVar[str] = "1"

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
        """Targets (N, D), their labels (N,), heights (N,), and the last gradient's norm."""
        x0, cond = bench.data(self.num_targets)
        noise = bench.noise(self.num_targets)
        y = (x0 + self.level * noise.normal(tuple(x0.shape[1:]), purpose="targets")).flatten(1).double()
        heights = torch.zeros(len(y), dtype=torch.float64)
        first, second = torch.zeros_like(heights), torch.zeros_like(heights)
        rate, draws, best, stalled, norm = self.learning_rate, self.num_draws, math.inf, 0, math.inf
        source = bench.noise(draws, first=len(y)).normal((y.shape[1],), purpose="source").double()
        scores = source @ y.T  # (draws, N)
        # A unit of height is a standard deviation of the scores.
        unit = float(scores.std())
        for k in range(1, self.num_iterations + 1):
            cell = (scores + heights).argmax(dim=1)
            measure = torch.bincount(cell, minlength=len(y)).double() / len(source)
            gradient = measure - 1.0 / len(y)
            norm = float(gradient.norm())
            if norm < self.tolerance and bool((measure > 0).all()):
                break
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            step = (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-12)
            heights = heights - rate * unit * step
            heights = heights - heights.mean()
            stalled = 0 if norm < best else stalled + 1
            best = min(best, norm)
            if stalled >= 50:
                rate, stalled = 0.8 * rate, 0
        labels = torch.zeros(len(y)) if cond is None else cond
        return {
            "targets": y.float().cpu().numpy(),
            "heights": heights.numpy(),
            "labels": labels.cpu().numpy().astype(np.int64),
            "gradient_norm": np.array([norm]),
        }

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
