"""Optimal boundary condition: one starting noise for all, found on a reference set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.registry import initials
from tasks.types import Noise


@initials.register("shared_noise")
@dataclass(frozen=True)
class SharedNoise:
    """The starting noise whose deterministic trajectories come closest to a reference set, shared by every row.

    ``x_T* = argmin over K random candidates of sum over (condition, image) of |ODE(x_T; condition) - image|^2``, by
    successive
    halving: all candidates on a few pairs, the better half on twice as many, and so on. For restoration, where the
    noise that is good for some inputs is good for all.

    Args:
        num_candidates: K.
        num_references: reference pairs of the last round.
        first_references: pairs of the first round.
        artifact: file with a noise found before.

    Reference: Ma et al. 2023, "Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image
    Super-Resolution". They measure with LPIPS and up to 1000 candidates; mean squared error here, so that exact answers
    apply.
    Cost: none when sampling; up to num_candidates times first_references times 2 log2(K) trajectories once.
    """

    num_candidates: int = 256
    num_references: int = 64
    first_references: int = 8
    artifact: str = ""

    evaluations = 0
    calibrated_on: ClassVar[tuple[str, ...]] = ("solver", "times", "guidance", "seed", "dtype")
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if min(self.num_candidates, self.num_references, self.first_references) < 1:
            raise ValueError(
                "shared_noise needs num_candidates, num_references and first_references of at least 1, got "
                f"{self.num_candidates}, {self.num_references} and {self.first_references}."
            )

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {k: getattr(self, k) for k in ("num_candidates", "num_references", "first_references")}

    def check_recipe(self, recipe: Any) -> None:
        """Refuse tokens, and a stochastic solver: there the search would fit the noise of the steps.

        Raises:
            ValueError: says which solvers fit.
        """
        if recipe.parts.solver.stochastic:
            raise ValueError(
                f"initial shared_noise is found along an ODE, but solver {recipe.solver['name']} draws noise. "
                "Choose a deterministic solver."
            )
        if recipe.parts.model.noising.kind == "masked":
            raise ValueError(
                f"initial shared_noise is found along an ODE, but model {recipe.model['name']} has tokens."
            )

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """The noise (*shape) in units of the prior, and its mean squared error."""
        images, cond = bench.data(self.num_references)
        shape = tuple(bench.model.shape)
        candidates = bench.noise(self.num_candidates).normal(shape, purpose="candidates")
        alive, pairs = torch.arange(self.num_candidates), min(self.first_references, self.num_references)
        error = torch.full((self.num_candidates,), torch.inf, dtype=torch.float64)
        while True:
            for k in alive.tolist():
                error[k] = self._error(bench, candidates[k], images[:pairs], None if cond is None else cond[:pairs])
            if len(alive) == 1 or pairs == self.num_references:
                break
            alive = alive[error[alive].argsort()[: max(1, len(alive) // 2)]]
            pairs = min(2 * pairs, self.num_references)
        best = int(alive[error[alive].argmin()])
        return {"noise": candidates[best].cpu().numpy(), "error": np.array([float(error[best])])}

    def _error(self, bench: Any, noise: Tensor, images: Tensor, cond: Tensor | None) -> float:
        from dataclasses import replace

        sampler = replace(bench.sampler(len(images), initial=_Fixed(noise)), cond=cond)
        end = bench.model.decode(sampler.run(bench.noise(len(images))).x, cond)
        return float((end - images).double().square().mean())

    def start(self, process: Any) -> float:
        """1."""
        return 1.0

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) copies."""
        found = torch.from_numpy(self.calibrated["noise"])  # type: ignore[attr-defined]
        return _Fixed(found.to(noise.device, getattr(noise, "dtype", found.dtype)))(sampler, noise)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Fixed:
    """The same noise for every row."""

    noise: Tensor

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        std = sampler.model.process.prior_std(sampler.times[0])
        return std * self.noise.expand(noise.num_rows, *self.noise.shape).clone()
