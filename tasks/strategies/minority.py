"""Minority guidance without a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tasks import smc
from tasks.account import Account
from tasks.minority import minority_score
from tasks.registry import strategies
from tasks.smc import Resampling
from tasks.types import Noise, Reward, Samples


@strategies.register("minority")
@dataclass(frozen=True)
class Minority:
    """Steer towards rare samples: particles weighted by how badly the model restores their prediction from noise.

    A draw from ``p(x) exp(strength m(x))`` (up to particles and steps) with the minority score
    ``m(x) = mean |x - x0_hat(alpha_t x + sigma_t eps)|^2``, by resampling K particles: after every ``interval`` steps a
    particle's weight is multiplied by ``exp(strength (m_now - m_before))``, with m asked of its clean prediction. The
    scores are estimates from a few draws, but each is kept and divided out as it was, so the product telescopes.

    This is the form of minority guidance that needs no training; the other one trains a classifier of score quantiles
    on noisy data.

    Args:
        n: particles K of a sample.
        strength: weight of the score; larger is rarer.
        time: noise level at which m is asked: how coarse the structure is whose rarity counts.
        draws: noises of one score.
        interval: steps between two scores.
        threshold: particles of a sample are resampled when its effective sample size falls below threshold K.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Um et al. 2024, "Don't Play Favorites: Minority Guidance for Diffusion Models" (score); Singhal et
        al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion Models" (steering).
    Cost: K times (the solver's evaluations and ``draws`` for every score); no reward calls.
    Identities: with n=1 this is ``single``, draw for draw, and nothing is scored.
    """

    n: int = 4
    strength: float = 10.0
    time: float = 0.5
    draws: int = 5
    interval: int = 5
    threshold: float = 0.5
    budget: dict[str, float] = field(default_factory=dict)

    uses_reward = False
    semantics = "sample"

    def __post_init__(self) -> None:
        if self.n < 1 or self.draws < 1 or self.interval < 1:
            raise ValueError(
                "minority needs strategy.n, strategy.draws and strategy.interval of at least 1, got "
                f"{self.n}, {self.draws} and {self.interval}."
            )
        if not self.strength > 0:
            raise ValueError(f"strategy.strength must be positive, got {self.strength}.")
        if not 0 < self.time < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"minority needs 0 < strategy.time < 1 and 0 <= strategy.threshold <= 1, got {self.time} and "
                f"{self.threshold}."
            )

    @property
    def particles(self) -> int:
        """K."""
        return self.n

    @property
    def branches(self) -> bool:
        """A single particle is never copied."""
        return self.n > 1

    def check_recipe(self, recipe: Any) -> None:
        """States that can be noised by a Gaussian."""
        if recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(f"strategy minority noises with a Gaussian, but model {recipe.model['name']} has tokens.")

    def _scored(self, num_steps: int) -> list[int]:
        return [i for i in range(num_steps) if (i + 1) % self.interval == 0 and i < num_steps - 1]

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories, and ``draws`` evaluations for every score."""
        if self.n == 1:
            return Account(nfe=sum(evaluations))
        return Account(nfe=self.n * (sum(evaluations) + self.draws * (len(self._scored(len(evaluations))) + 1)))

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples drawn by weight, with columns ``minority_score`` (B,), ``log_z`` (B,), ``ess`` (B, number
        of scores), ``log_weights`` (B, K), ``slot`` (B,) and ``unique_ancestors`` (B,).
        """
        if self.n == 1:
            return Samples(sampler.run(noise).x)
        wide, streams = sampler.repeat(self.n), noise.repeat(self.n)  # type: ignore[attr-defined]
        particles = smc.begin(wide, self.n, streams)
        particles = particles.put(score=torch.zeros_like(particles.log_w))
        how = Resampling(trigger="ess", threshold=self.threshold) if self.threshold else Resampling(trigger="never")
        scored, last = set(self._scored(sampler.num_steps)), sampler.num_steps - 1
        for i in range(sampler.num_steps):
            particles = replace(particles, state=wide.step(particles.state, streams))
            if i not in scored and i != last:
                continue
            clean = particles.state.x if i == last else particles.state.x0_hat
            assert clean is not None
            now = minority_score(wide.model, clean, wide.cond, self.time, self.draws, streams.at(i))
            particles = particles.weigh(self.strength * (now - particles.cache["score"])).put(score=now)
            if i != last:
                particles = particles.resample(how, noise.at(i))
        made = smc.outcome(particles, particles.state.x, None, noise.at(sampler.num_steps), "sample", None)
        chosen = torch.arange(len(made.x0), device=made.x0.device) * self.n + made.columns["slot"]
        return replace(made, columns={**made.columns, "minority_score": particles.cache["score"][chosen]})
