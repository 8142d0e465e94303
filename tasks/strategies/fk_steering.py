"""Feynman-Kac steering."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks import kernels, smc
from tasks.account import Account
from tasks.registry import strategies, unknown
from tasks.smc import ParticleState, Resampling
from tasks.types import Noise, Reward, Samples

POTENTIALS = ("difference", "max", "sum", "immediate")


@strategies.register("fk_steering")
@dataclass(frozen=True)
class FKSteering:
    """Feynman-Kac steering: particles of the recipe's own sampler, resampled by the reward of their clean predictions.

    At the scheduled nodes i the prediction gets a reward r_i and the weights the potential G_i:

        difference: log G = c strength (r_i - r_previous)      max: log G = c strength max_{j <= i} r_j
        immediate:  log G = c strength r_i                     sum: log G = c strength sum_{j <= i} r_j

    and at the end the rest, ``strength r(x_0) - sum_i log G_i``. So every path has the total weight ``exp(strength
    r(x_0))`` and the samples go to ``p(x_0) exp(strength r(x_0)) / Z``, whatever the potential; weights of groups that
    are not resampled are carried. With few particles samples are biased by O(1/K), while Z is unbiased for any K.

    Args:
        particles: K trajectories a sample.
        strength: inverse temperature of the tilt; the penalty for leaving the model is 1 / strength.
        potential: difference, max, sum or immediate.
        potential_scale: c; 1 is the published form. Of n scheduled nodes, 1/n for max and immediate and 2/n^2 for sum
            keep the intermediate laws from being tilted too far.
        every: a node is scheduled every so many steps.
        first: the first scheduled node.
        last: no node after this one is scheduled; null goes on to the end.
        trigger: always (at every scheduled node), ess (when the effective size there is below threshold K) or never.
        threshold: share of K.
        scheme: systematic, stratified, residual, multinomial (the published one) or ssp.
        predictions: clean guesses per particle and node; of tokens, whose prediction is a distribution, several are
            drawn and ``log mean exp(strength r) / strength`` is the reward.
        lag: score the prediction that the last step was made with, that of the parent: it costs no evaluation whatever
            the solver (the published way). False scores a particle by its own prediction, which the next step then
            uses: it needs a solver of one evaluation a step.
        output: sample (a draw by weight), all (the same, with every particle in the column ``candidates``), or best
            (the largest reward: an optimiser, no draw).
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Singhal et al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion Models".
        We differ in the terminal correction of max and in carrying weights; their adaptive mode drops them.
    Cost: K times the solver's evaluations, and K (n + 1) reward calls (times ``predictions``).
    Identities: with particles=1 this is ``single``, draw for draw.
    """

    particles: int = 4
    strength: float = 10.0
    potential: str = "difference"
    potential_scale: float = 1.0
    every: int = 5
    first: int = 5
    last: int | None = None
    trigger: str = "always"
    threshold: float = 0.5
    scheme: str = "systematic"
    predictions: int = 1
    lag: bool = True
    output: str = "sample"
    budget: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"strategy.particles must be at least 1, got {self.particles}.")
        if not self.strength > 0 or not self.potential_scale > 0:
            raise ValueError(
                "strategy.strength and strategy.potential_scale must be positive, got "
                f"{self.strength} and {self.potential_scale}. To prefer small rewards, use the negative reward."
            )
        if self.potential not in POTENTIALS:
            raise unknown("potential", self.potential, list(POTENTIALS), "Allowed")
        if self.every < 1 or self.first < 1 or self.predictions < 1:
            raise ValueError(
                "strategy.every, strategy.first and strategy.predictions must be at least 1, got "
                f"{self.every}, {self.first} and {self.predictions}."
            )
        smc.check_output(self.output)
        _ = self.resampling

    @property
    def resampling(self) -> Resampling:
        """When and how."""
        return Resampling(self.scheme, self.trigger, self.threshold)

    @property
    def uses_reward(self) -> bool:
        """One particle needs no choice."""
        return self.particles > 1

    @property
    def intermediate(self) -> bool:
        """Clean predictions are judged."""
        return self.particles > 1

    @property
    def branches(self) -> bool:
        """Resampling copies particles."""
        return self.particles > 1 and self.trigger != "never"

    @property
    def semantics(self) -> str:
        """A draw from the tilted law, or the best particle."""
        return "best" if self.output == "best" else "sample"

    def scheduled(self, num_steps: int) -> tuple[int, ...]:
        """The nodes, between 1 and num_steps - 1, at which predictions are scored."""
        last = num_steps - 1 if self.last is None else min(self.last, num_steps - 1)
        return tuple(range(self.first, last + 1, self.every))

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories; a reward a particle at every scheduled node and at the end."""
        if self.particles == 1:
            return Account(sum(evaluations))
        calls = self.particles * (len(self.scheduled(len(evaluations))) * self.predictions + 1)
        return Account(self.particles * sum(evaluations), calls, calls)

    def check_recipe(self, recipe: Any) -> None:
        """Refuse guesses of what is no distribution, and own predictions of solvers that cannot use them."""
        if self.predictions > 1 and recipe.parts.model.noising.kind == "gaussian":
            raise ValueError(
                f"strategy.predictions={self.predictions}, but a Gaussian process predicts one point. Use 1."
            )
        if self.particles > 1 and not self.lag:
            kernels.check_asks_once(recipe)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with the columns of ``tasks.smc.outcome``."""
        if self.particles == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        count, steps = self.particles, sampler.num_steps
        wide, streams = sampler.repeat(count), noise.repeat(count)  # type: ignore[attr-defined]
        particles = smc.begin(wide, count, streams)
        zeros = torch.zeros_like(particles.log_w)
        particles = particles.put(spent=zeros, previous=zeros, largest=zeros - math.inf, total=zeros)
        nodes = set(self.scheduled(steps))
        for i in range(steps):
            stepping = wide
            if i in nodes and not self.lag:
                x = particles.state.x
                x0_hat = wide.model.denoise(x, wide.times[i], wide.cond)
                particles = replace(particles, state=replace(particles.state, x0_hat=x0_hat))
                particles = self._steer(particles, wide, reward, streams.at(i), noise.at(i))
                known: Any = particles.state.x0_hat  # moved with its particle
                stepping = kernels.primed(wide, particles.state.x, known)
            particles = replace(particles, state=stepping.step(particles.state, streams))
            if i in nodes and self.lag:
                particles = self._steer(particles, wide, reward, streams.at(i), noise.at(i))
        x0 = particles.state.x
        decoded = wide.model.decode(x0, wide.cond)
        rewards = reward(decoded, wide.cond)
        particles = particles.weigh(self.strength * rewards.double() - particles.cache["spent"])
        return smc.outcome(particles, x0, rewards, noise.at(steps), self.output, decoded)

    def _steer(
        self, particles: ParticleState, sampler: Any, reward: Reward, streams: Noise, groups: Noise
    ) -> ParticleState:
        """Score, weigh and perhaps resample."""
        score = self._score(particles.state.x0_hat, sampler, reward, streams)
        cache = particles.cache
        largest, total = torch.maximum(cache["largest"], score), cache["total"] + score
        of = {"difference": score - cache["previous"], "max": largest, "sum": total, "immediate": score}
        log_g = self.potential_scale * self.strength * of[self.potential]
        particles = particles.put(spent=cache["spent"] + log_g, previous=score, largest=largest, total=total)
        return particles.weigh(log_g).resample(self.resampling, groups)

    def _score(self, x0_hat: Any, sampler: Any, reward: Reward, streams: Noise) -> Tensor:
        """Reward of clean predictions, (B K,) float64."""
        found = []
        for k in range(self.predictions):
            guess = sampler.model.process.readout(x0_hat, _Draw(streams, k))
            found.append(reward(sampler.model.decode(guess, sampler.cond), sampler.cond).double())
        if len(found) == 1:
            return found[0]
        return smc.log_mean_exp(self.strength * torch.stack(found, dim=1)) / self.strength


@dataclass(frozen=True)
class _Draw:
    """Streams whose purposes carry a number: the k-th guess at one step."""

    streams: Noise
    number: int

    def uniform(self, shape: tuple[int, ...], purpose: str) -> Tensor:
        return self.streams.uniform(shape, f"{purpose}/{self.number}")
