"""Posterior sampling by weighted particles, without approximating the likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tasks import smc
from tasks.account import Account
from tasks.processes import transfer
from tasks.registry import strategies
from tasks.smc import Resampling
from tasks.types import Noise, Samples, State


@strategies.register("afdps")
@dataclass(frozen=True)
class AFDPS:
    """Approximation-free posterior sampling: weighted particles follow ``p_t(x) exp(strength beta_t r(x))`` to the end.

    The reward (the log-likelihood of a measurement, or any that has a gradient) is asked at the noisy states, with
    ``beta_t = (1 - t)^power`` running from 0 to 1, so nothing is assumed of what a noisy state will become: the law at
    t=0 is the posterior. Particles run the reverse process with the score ``s + kappa beta grad r``, and the weights
    that correct them are, per unit of reverse time,

    ``beta' r - beta <f, grad r> + g^2 [(kappa - 1/2) beta lap r + kappa beta <s, grad r> + (kappa - 1/2) beta^2 |grad
    r|^2]``.

    At kappa = 1/2 this is ``beta' r + beta <v, grad r>`` with v the velocity of the probability-flow ODE, i.e. the
    change of ``beta r`` along it. So the weight of a step is ``beta_s r(Phi x_t) - beta_t r(x_t)`` with Phi the
    deterministic DDIM step: no derivative of r, no singularity at either end. A measurement's pull is integrated
    exactly (as an Ornstein-Uhlenbeck process), any other reward's by Euler's method.

    Args:
        n: particles K of a sample.
        kappa: how much of the gradient drives the particles; other values than 1/2 need the reward's Laplacian.
        power: beta_t = (1 - t)^power; 0 keeps beta at 1 (the paper's choice, with kappa=1), which degenerates.
        strength: inverse temperature; 1 is the posterior.
        threshold: particles of a sample are resampled when its effective sample size falls below threshold K.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Chen et al. 2025, "Solving Inverse Problems via Diffusion-Based Priors: An Approximation-Free Ensemble
        Sampling Approach" (kappa=1, power=0); Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion" (reward tilt).
    Cost: K times the solver's evaluations, no backward pass through the network, 2 K reward calls a step (two products
        with A each, for a measurement).
    Identities: one particle with kappa=0 is ``single`` with solver=ddim, eta=1, draw for draw; exp(log_z) is an
        unbiased estimate of the evidence up to the error of the steps.
    """

    n: int = 16
    kappa: float = 0.5
    power: float = 2.0
    strength: float = 1.0
    threshold: float = 0.5
    budget: dict[str, float] = field(default_factory=dict)

    uses_reward = True
    branches = True
    intermediate = True
    semantics = "sample"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"strategy.n must be at least 1, got {self.n}.")
        if not 0 <= self.kappa <= 1 or not self.power >= 0:
            raise ValueError(
                f"strategy.kappa must be between 0 and 1 and strategy.power at least 0, got {self.kappa} and "
                f"{self.power}."
            )
        if not self.strength > 0:
            raise ValueError(f"strategy.strength must be positive, got {self.strength}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"strategy.threshold must be between 0 and 1, got {self.threshold}.")

    @property
    def particles(self) -> int:
        """K."""
        return self.n

    def check_recipe(self, recipe: Any) -> None:
        """Ancestral steps, and a reward with what the weights need of it.

        Raises:
            ValueError: says what is missing.
        """
        if (
            recipe.solver["name"] != "ddim"
            or recipe.solver["eta"] != 1.0
            or getattr(recipe.parts.times, "travels", False)
        ):
            raise ValueError(
                f"strategy afdps weighs ancestral steps, but the solver is {recipe.solver['name']} with times "
                f"{recipe.times['name']}. Use solver=ddim solver.eta=1 times=uniform."
            )
        if recipe.parts.reward is None:
            return  # refused elsewhere
        if not getattr(recipe.parts.reward, "differentiable", False):
            raise ValueError(
                f"strategy afdps follows the gradient of its reward, which {recipe.reward['name']} does not give. Use "
                "reward=measurement."
            )
        if self.kappa != 0.5 and recipe.reward["name"] != "measurement":
            raise ValueError(
                f"strategy.kappa={self.kappa} needs the reward's Laplacian, which {recipe.reward['name']} does not "
                "give. Use strategy.kappa=0.5."
            )

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories, and two reward calls for every step of each."""
        return Account(nfe=self.n * sum(evaluations), reward_calls=2 * self.n * len(evaluations) + self._first)

    @property
    def _first(self) -> int:
        return self.n if self.power == 0 else 0  # the weight of the start

    def _beta(self, t: float) -> float:
        return self.strength * (1.0 - t) ** self.power

    def __call__(self, sampler: Any, reward: Any, noise: Noise) -> Samples:
        """(B, *shape) samples drawn by weight, with columns ``log_z`` (B,), ``ess`` (B, T), ``log_weights`` (B, K),
        ``slot`` (B,) and ``unique_ancestors`` (B,).
        """
        wide, streams = sampler.repeat(self.n), noise.repeat(self.n)  # type: ignore[attr-defined]
        asked = reward.at(streams.indices)
        particles = smc.begin(wide, self.n, streams)
        if self._first:
            start = self._beta(sampler.times[0]) * asked(particles.state.x, wide.cond).double()
            particles = replace(particles, log_w=start)
        how = Resampling(trigger="ess", threshold=self.threshold) if self.threshold else Resampling(trigger="never")
        for i in range(sampler.num_steps):
            state, gain = self._step(wide, asked, particles.state, streams)
            particles = replace(particles, state=state).weigh(gain)
            if i < sampler.num_steps - 1:
                particles = particles.resample(how, noise.at(i))
        return smc.outcome(particles, particles.state.x, None, noise.at(sampler.num_steps), "sample", None)

    def _step(self, wide: Any, asked: Any, state: State, streams: Noise) -> tuple[State, Tensor]:
        """One ancestral step with its pull, and the gain of every particle's log weight, (B K,)."""
        process, cond = wide.model.process, wide.cond
        t, s = wide.times[state.step], wide.times[state.step + 1]
        beta_t, beta_s = self._beta(t), self._beta(s)
        moved = wide.step(state, streams)
        assert moved.x0_hat is not None
        alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        ratio = alpha_t / alpha_s
        spread = sigma_t**2 - (ratio * sigma_s) ** 2  # of the forward step from s to t: the integral of g^2
        # The shift that a change of the score by beta grad r makes in the mean of an ancestral step. Where there is no
        # signal at all (alpha = 0, a flow at t=1) beta is 0 too, unless it is kept constant.
        push = self.kappa * beta_t * spread / ratio if beta_t > 0 and ratio > 0 else 0.0
        carry = ratio * sigma_s**2 / sigma_t**2
        mean = carry * state.x + (alpha_s - alpha_t * carry) * moved.x0_hat
        scorer = asked.scorer
        exact = hasattr(scorer, "relax")
        if exact:
            before = asked(state.x, cond).double()
            x = scorer.relax(mean, moved.x - mean, push) if push > 0 else moved.x
            slope = scorer.operator.adjoint(scorer.residual(state.x)) / scorer.sigma_y**2 if self.kappa != 0.5 else None
        else:
            with torch.enable_grad():
                start = state.x.detach().requires_grad_()
                values = asked(start, cond)
                (slope,) = torch.autograd.grad(values.sum(), start)
            before = values.detach().double()
            x = moved.x + push * slope if push > 0 else moved.x
        after = asked(transfer(process, state.x, moved.x0_hat, t, s), cond).double()
        gain = beta_s * after - beta_t * before
        if self.kappa != 0.5:
            assert slope is not None
            score = (alpha_t * moved.x0_hat - state.x).double() / sigma_t**2
            inner = (score * slope).flatten(1).sum(1) + beta_t * slope.square().flatten(1).sum(1)
            gain = gain + (self.kappa - 0.5) * spread * beta_t * (scorer.laplacian + inner)
        return replace(moved, x=x), gain
