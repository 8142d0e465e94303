"""A filter of hallucinations by the variance along a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.account import Account
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, State, reindex


def watched(sampler: Any, noise: Noise, last: int) -> tuple[State, Tensor]:
    """Run trajectories, and the variance of their clean predictions over the last steps.

    Returns:
        the last state, and ``h = mean over elements of Var over the last steps of x0_hat``, (B,) float64.
    """
    state = sampler.start(noise)
    count, mean, total = 0, torch.zeros_like(state.x, dtype=torch.float64), 0.0
    for i in range(sampler.num_steps):
        state = sampler.step(state, noise)
        if i >= sampler.num_steps - last:  # Welford: no trajectory is kept
            count += 1
            change = state.x0_hat.double() - mean
            mean = mean + change / count
            total = total + change * (state.x0_hat.double() - mean)
    variance = total / count if isinstance(total, Tensor) else torch.zeros_like(mean)
    return state, variance.flatten(1).mean(dim=1)


@strategies.register("variance_filter")
@dataclass(frozen=True)
class VarianceFilter:
    """Reject samples whose clean prediction wavers at the end of its trajectory, as it does between modes.

    ``h = mean over elements of Var_i x0_hat(x_{t_i})`` over the last steps. A sample is drawn again, at most n times,
    until h is under a threshold: the quantile ``1 - discard`` of h over trajectories that a calibration runs with the
    same sampler (injected noise raises h, so it must be). The first that passes is kept, or the one with the smallest h
    if none does. h is a column of every row, also with n=1.

    Args:
        n: most trajectories of a sample.
        window: the last part of the steps, over which the variance is taken.
        discard: the fraction of samples that the threshold is to reject.
        pilot: trajectories of the calibration.
        threshold: a threshold of your own; then nothing is calibrated.
        artifact: file with a threshold made before.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Aithal et al. 2024, "Understanding Hallucinations in Diffusion Models through Mode Interpolation",
    section 5.
    Cost: the solver's evaluations for every trajectory that is drawn, about 1 / (1 - discard) of them; nothing for h.
    Identities: with n=1 this is ``single``, draw for draw, and one more column.
    """

    n: int = 4
    window: float = 0.2
    discard: float = 0.05
    pilot: int = 512
    threshold: float | None = None
    artifact: str = ""
    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    uses_reward = False
    branches = False
    semantics = "sample"
    calibrated_on: ClassVar[tuple[str, ...]] = ("solver", "times", "initial", "guidance", "labels", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.n < 1 or self.pilot < 2:
            raise ValueError(
                f"strategy.n must be at least 1 and strategy.pilot at least 2, got {self.n} and {self.pilot}."
            )
        if not 0 < self.window <= 1 or not 0 <= self.discard < 1:
            raise ValueError(
                f"variance_filter needs 0 < strategy.window <= 1 and 0 <= strategy.discard < 1, got {self.window} and "
                f"{self.discard}."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Continuous clean predictions at every step."""
        if recipe.parts.model.noising.kind != "gaussian" or recipe.solver["name"] == "diffusers":
            raise ValueError(
                "strategy variance_filter needs the clean prediction of every step, which solver "
                f"{recipe.solver['name']} does not give. Use solver=ddim."
            )

    @property
    def is_calibrated_here(self) -> bool:
        """One candidate needs no threshold."""
        return self.n > 1 and self.threshold is None

    def calibration_fields(self) -> dict[str, Any]:
        """What the threshold depends on."""
        return {"window": self.window, "discard": self.discard, "pilot": self.pilot}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The quantile of h over trajectories that no study uses."""
        sampler = bench.sampler(self.pilot)
        _, h = watched(sampler, bench.noise(self.pilot), self._last(sampler.num_steps))
        return {"threshold": np.array([np.quantile(h.cpu().numpy(), 1 - self.discard)])}

    def account(self, evaluations: Sequence[int]) -> Account:
        """At most n trajectories."""
        return Account(nfe=self.n * sum(evaluations), exact=self.n == 1)

    def _last(self, num_steps: int) -> int:
        return min(num_steps, max(2, round(self.window * num_steps)))

    def _limit(self) -> float:
        if self.threshold is not None:
            return self.threshold
        return float(self.calibrated["threshold"][0])  # type: ignore[attr-defined]

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with columns ``trajectory_variance`` (B,), and for n > 1 ``candidates`` (B,), ``slot``
        (B,) and ``nfe`` (B,).
        """
        last = self._last(sampler.num_steps)
        if self.n == 1:
            state, h = watched(sampler, noise, last)
            return Samples(state.x, {"trajectory_variance": h})
        limit, rows = self._limit(), noise.num_rows
        kept: Tensor | None = None
        best = torch.full((rows,), torch.inf, dtype=torch.float64, device=noise.indices.device)
        slot, candidates = torch.zeros_like(noise.indices), torch.zeros_like(noise.indices)
        spent = torch.zeros_like(noise.indices)
        for k in range(self.n):
            open_rows = (best > limit).nonzero()[:, 0]
            if not len(open_rows):
                break
            # A network's last bits depend on how many rows it is given, so a batch is filled up with rows of its own.
            index = open_rows[torch.arange(rows, device=open_rows.device) % len(open_rows)]
            counted = getattr(sampler.model, "rows", 0)
            state, h = watched(sampler.select(index), reindex(noise, index).slot(k), last)
            h, x = h[: len(open_rows)], state.x[: len(open_rows)]
            better = h < best[open_rows]
            kept = x.clone() if kept is None else kept
            kept[open_rows[better]], slot[open_rows[better]] = x[better], k
            best[open_rows] = torch.minimum(best[open_rows], h)
            candidates[open_rows] += 1
            spent[open_rows] += (getattr(sampler.model, "rows", 0) - counted) // rows
        assert kept is not None
        columns = {"trajectory_variance": best, "candidates": candidates, "slot": slot, "nfe": spent.int()}
        return Samples(kept, columns)
