"""Tempered SMC with gradient twists (DAS)."""

from __future__ import annotations

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

TEMPERINGS = ("power", "linear", "adaptive")
_BISECTIONS = 40


@strategies.register("das")
@dataclass(frozen=True)
class DAS:
    """Tempered sequential Monte Carlo whose proposal follows the reward's gradient through the network.

    With ``psi_i = lam_i strength r(x0_hat(x_i))``, tempered by ``0 <= lam_0 <= ... <= lam_T = 1``, particles move by

        x_{i+1} ~ q = N(mean + std^2 grad psi, std^2 I),    log w += log p(x_{i+1} | x_i) - log q + psi_{i+1} - psi_i

    where p = N(mean, std^2 I) is the solver's own step, and psi_T = strength r(x_0). Since q is evaluated, a clipped
    gradient or any tempering leaves the target ``p(x_0) exp(strength r(x_0)) / Z``; Z is unbiased for temperings that
    were fixed beforehand and consistent for the adaptive one. Prediction, reward, twist and gradient of a particle move
    with it when groups are resampled.

    Args:
        particles: K trajectories a sample.
        strength: inverse temperature; 1/alpha of the paper.
        tempering: power, ``lam_i = min((1 + gamma)^i - 1, 1)``; linear, ``i / T``; or adaptive, the largest lam_i up to
            the power tempering's that keeps the conditional effective size at ``conditional`` K, found by bisection for
            every group. (Without that bound lam is 1 at the start, where all predictions are alike.)
        gamma: growth of the power tempering.
        conditional: share of K that an adaptive step keeps.
        clip: largest norm of ``std grad psi`` per particle, the shift in units of the noise; null is no limit.
        trigger: ess, always or never.
        threshold: share of K below which ess resamples.
        scheme: ssp, systematic, stratified, residual or multinomial.
        output: sample (a draw by weight), all (with every particle in the column ``candidates``), or best (the largest
            reward: an optimiser, no draw).
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Kim et al. 2025, "Test-time Alignment of Diffusion Models without Reward Over-optimization". Their code
        leaves twists and gradients behind when it resamples, and finds the adaptive temper by gradient descent.
    Cost: K times the solver's evaluations, as many backward passes, and K (T + 1) rewards.
    Identities: with particles=1 this is ``single``, draw for draw.
    """

    particles: int = 4
    strength: float = 10.0
    tempering: str = "power"
    gamma: float = 0.008
    conditional: float = 0.9
    clip: float | None = None
    trigger: str = "ess"
    threshold: float = 0.5
    scheme: str = "ssp"
    output: str = "sample"
    budget: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"strategy.particles must be at least 1, got {self.particles}.")
        if not self.strength > 0 or not self.gamma > 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                "strategy.strength, strategy.gamma and strategy.clip must be positive, got "
                f"{self.strength}, {self.gamma} and {self.clip}. To prefer small rewards, use the negative one."
            )
        if self.tempering not in TEMPERINGS:
            raise unknown("tempering", self.tempering, list(TEMPERINGS), "Allowed")
        if not 0 < self.conditional < 1:
            raise ValueError(f"strategy.conditional is a share of the particles in (0, 1), got {self.conditional}.")
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
        """Resampling copies particles; and a proposal needs noise."""
        return self.particles > 1

    @property
    def semantics(self) -> str:
        """A draw from the tilted law, or the best particle."""
        return "best" if self.output == "best" else "sample"

    def account(self, evaluations: Sequence[int]) -> Account:
        """K trajectories with their backward passes; a reward a particle at every node and at the end."""
        spent = self.particles * sum(evaluations)
        if self.particles == 1:
            return Account(spent)
        calls = self.particles * (len(evaluations) + 1)
        return Account(spent, calls, calls, spent)

    def check_recipe(self, recipe: Any) -> None:
        """Refuse rewards without a gradient, tokens, and solvers whose steps have no density."""
        if self.particles == 1:
            return
        if not getattr(recipe.parts.reward, "differentiable", False):
            raise ValueError(
                f"strategy das follows the gradient of the reward, but {recipe.reward['name']} has none. Use a reward "
                "that is differentiable, or strategy=fk_steering."
            )
        kernels.check_kernel(recipe)

    def tempers(self, steps: int) -> list[float]:
        """lam_0 to lam_T of the temperings that are fixed beforehand."""
        if self.tempering == "linear":
            return [i / steps for i in range(steps + 1)]
        return [min((1 + self.gamma) ** i - 1, 1.0) for i in range(steps)] + [1.0]

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with the columns of ``tasks.smc.outcome`` and the last inner ``temper`` (B,)."""
        if self.particles == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        count, steps = self.particles, sampler.num_steps
        wide, streams = sampler.repeat(count), noise.repeat(count)  # type: ignore[attr-defined]
        particles = smc.begin(wide, count, streams)
        zeros = torch.zeros_like(particles.log_w)
        particles = particles.put(psi=zeros, move=zeros)
        fixed, temper = self.tempers(steps), torch.zeros_like(particles.log_z)
        for i in range(steps):
            x0_hat, score, gradient = _scored(wide, reward, particles.state.x, i)
            particles = particles.put(x0_hat=x0_hat, gradient=gradient)
            if self.tempering == "adaptive":
                temper = following = self._temper(particles, score, temper, fixed[i])
            else:
                temper, following = torch.full_like(temper, fixed[i]), torch.full_like(temper, fixed[i + 1])
            psi = self.strength * temper.repeat_interleave(count) * score
            particles = particles.weigh(particles.cache["move"] + psi - particles.cache["psi"]).put(psi=psi)
            particles = particles.resample(self.resampling, noise.at(i))
            particles = self._move(particles, wide, following.repeat_interleave(count), i, streams.at(i))
        x0 = particles.state.x
        decoded = wide.model.decode(x0, wide.cond)
        rewards = reward(decoded, wide.cond)
        particles = particles.weigh(particles.cache["move"] + self.strength * rewards.double() - particles.cache["psi"])
        result = smc.outcome(particles, x0, rewards, noise.at(steps), self.output, decoded)
        return replace(result, columns={**result.columns, "temper": temper})

    def _move(self, particles: ParticleState, sampler: Any, temper: Tensor, step: int, streams: Noise) -> ParticleState:
        """Draw from the twisted kernel; what the draw owes to the plain one is kept for the next weighing."""
        state, cache = particles.state, particles.cache
        base = kernels.kernel_of(sampler, state.x, cache["x0_hat"], step)
        shape = (-1, *[1] * (state.x.dim() - 1))
        push = self.strength * temper.view(shape) * cache["gradient"].double()
        if self.clip is not None and base.std > 0:
            size = base.std * push.flatten(1).norm(dim=1).view(shape)
            push = push * (self.clip / size.clamp(min=self.clip))
        proposal = base.twisted(push)
        x = proposal.draw(streams)
        return replace(
            particles.put(move=kernels.log_ratio(base, proposal, x)),
            state=replace(state, x=x, x0_hat=cache["x0_hat"], step=step + 1),
        )

    def _temper(self, particles: ParticleState, score: Tensor, before: Tensor, most: float) -> Tensor:
        """The largest temper of every group that keeps the conditional effective size, (B,)."""
        count = particles.num_particles
        owed = (particles.cache["move"] - particles.cache["psi"]).view(-1, count)
        score = self.strength * score.view(-1, count)
        weights = torch.log_softmax(particles.grouped, dim=1)

        def keeps(temper: Tensor) -> Tensor:
            gain = owed + temper[:, None] * score
            size = 2 * torch.logsumexp(weights + gain, dim=1) - torch.logsumexp(weights + 2 * gain, dim=1)
            return torch.exp(size) >= self.conditional

        low, high = before, torch.full_like(before, most)
        whole = keeps(high)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            good = keeps(middle)
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
        return torch.where(whole, torch.full_like(low, most), low)


def _scored(sampler: Any, reward: Reward, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean predictions of states, their rewards (N,) float64, and the gradient of these by the states."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        x0_hat = sampler.model.denoise(x, sampler.times[step], sampler.cond)
        score = reward(sampler.model.decode(x0_hat, sampler.cond), sampler.cond).double()
        if not score.requires_grad:
            raise ValueError("the reward or the decoder cuts the gradient. Use strategy=fk_steering, which needs none.")
        (gradient,) = torch.autograd.grad(score.sum(), x)
    return x0_hat.detach(), score.detach(), gradient
