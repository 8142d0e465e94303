"""Active sampling: where to measure next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks import guided_step
from tasks.account import Account
from tasks.registry import strategies
from tasks.types import Noise, Samples


def entropy_bound(values: Tensor, width: float) -> Tensor:
    """Bound on the entropy of an equal mixture of Gaussians of variance ``width^2`` around K values.

    ``H_j = -(1/K) sum_a log (1/K) sum_b exp(-(v_aj - v_bj)^2 / (2 width^2))``, up to a constant. For a large width it
    ranks like the sample variance; for a small one it counts how many values are different.

    Args:
        values: (B, K, M).

    Returns:
        (B, M), between 0 and log K.
    """
    particles = values.shape[1]
    total = torch.zeros_like(values[:, 0])
    for a in range(particles):
        gaps = (values[:, a : a + 1] - values).square() / (2 * width**2)
        total = total + torch.logsumexp(-gaps, dim=1) - math.log(particles)
    return -total / particles


@strategies.register("active_sampling")
@dataclass(frozen=True)
class ActiveSampling:
    """Active diffusion subsampling: measure where the clean predictions of guided particles disagree the most.

    All entries of the measurement exist, but none is known at first. At steps spread over ``window``, the entry with
    the largest entropy over the particles' predictions of it, ``A x0_hat``, is looked up; every step moves the
    particles against the gradient of the misfit with the entries known so far, as in ``dps``, and like there the
    samples are biased.

    The sign inside the exponential is that of a Gaussian density, a minus.

    Args:
        n: particles K that predict together.
        acquisitions: entries that are looked up.
        window: the part of the run over which they are spread, from and to, 0 for its start.
        width: standard deviation of the Gaussians in the entropy, in units of the measurement.
        zeta: step size of the guidance.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Nolan et al. 2025, "Active Diffusion Subsampling".
    Cost: K times the solver's evaluations and a backward pass for each; no reward calls (A is known).
    Identities: with acquisitions=0 this is ``single``, draw for draw.
    """

    n: int = 16
    acquisitions: int = 20
    window: tuple[float, ...] = (0.0, 0.8)
    width: float = 10.0
    zeta: float = 1.0
    budget: dict[str, float] = field(default_factory=dict)

    uses_reward = True
    branches = False
    semantics = "sample"
    bias = "the likelihood of a noisy state is that of its prediction"

    def __post_init__(self) -> None:
        if self.acquisitions < 0:
            raise ValueError(f"strategy.acquisitions must be at least 0, got {self.acquisitions}.")
        if self.n < 1 or (self.n == 1 and self.acquisitions):
            raise ValueError(f"strategy.n must be at least 2 (one particle disagrees with nobody), got {self.n}.")
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"strategy.window must be two numbers 0 <= from < to <= 1, got {list(self.window)}.")
        if not self.width > 0 or not self.zeta >= 0:
            raise ValueError(
                f"active_sampling needs strategy.width > 0 and strategy.zeta >= 0, got {self.width} and {self.zeta}."
            )

    @property
    def particles(self) -> int:
        """K."""
        return self.n

    def check_recipe(self, recipe: Any) -> None:
        """A measurement with enough entries, and predictions that can be differentiated."""
        guided_step.check_recipe(recipe)
        if recipe.parts.reward is not None:
            size = recipe.parts.reward.size
            if self.acquisitions > size:
                raise ValueError(
                    f"strategy.acquisitions is {self.acquisitions}, but the measurement has {size} entries. Lower it, "
                    "or use reward.operator=all."
                )

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories with a backward pass for every evaluation."""
        return Account(nfe=self.n * sum(evaluations), gradients=self.n * sum(evaluations))

    def schedule(self, num_steps: int) -> list[int]:
        """How many entries are looked up at every step."""
        first, last = (round(edge * num_steps) for edge in self.window)
        counts = [0] * num_steps
        for k in range(self.acquisitions):
            counts[min(first + k * max(last - first, 1) // self.acquisitions, num_steps - 1)] += 1
        return counts

    def __call__(self, sampler: Any, reward: Any, noise: Noise) -> Samples:
        """(B, *shape) samples, the first particle of each, with the column ``locations`` (B, acquisitions) in order."""
        wide, streams = sampler.repeat(self.n), noise.repeat(self.n)  # type: ignore[attr-defined]
        measured = reward.at(streams.indices).scorer
        state = wide.start(streams)
        rows = len(state.x) // self.n
        seen = torch.zeros(rows, measured.operator.size, dtype=torch.float64, device=state.x.device)
        locations: list[Tensor] = []
        for count in self.schedule(sampler.num_steps):

            def distance(x0_hat: Tensor, count: int = count) -> Tensor:
                if count:
                    locations.extend(self._look(measured.operator(x0_hat.detach()), seen, count))
                known = seen.repeat_interleave(self.n, dim=0) * measured.residual(x0_hat)
                return torch.linalg.vector_norm(known, dim=1)

            state, gradient = guided_step.step_with_gradient(wide, state, streams, distance)
            state = replace(state, x=state.x - self.zeta * gradient)
        columns = {"locations": torch.stack(locations, dim=1)} if locations else {}
        return Samples(state.x[:: self.n], columns)

    def _look(self, predicted: Tensor, seen: Tensor, count: int) -> list[Tensor]:
        """The unseen entries with the largest entropy, each (B,); marks them as seen."""
        entropy = entropy_bound(predicted.view(len(seen), self.n, -1), self.width)
        entropy = entropy.masked_fill(seen > 0, -torch.inf)
        found = entropy.argsort(dim=1, descending=True, stable=True)[:, :count]
        seen.scatter_(1, found, 1.0)
        return list(found.unbind(dim=1))
