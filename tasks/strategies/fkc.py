"""Feynman-Kac correctors: weighted reverse SDEs for annealed, guided, multiplied and tilted densities."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks import kernels, registry, smc
from tasks.account import Account
from tasks.registry import strategies
from tasks.sampler import CountedModel
from tasks.smc import ParticleState, Resampling
from tasks.types import Model, Noise, Reward, Samples

NOTHING_YET = 30.0  # noise-to-signal ratio, for data of unit size, above which a product's particles know nothing


@lru_cache(maxsize=4)
def _load(spec: str, device: str) -> Model:
    return registry.models.build(json.loads(spec)).load(device)


@strategies.register("fkc")
@dataclass(frozen=True)
class FKC:
    """Feynman-Kac correctors: samples of ``prod_i p_i^{b_i} exp(strength r)``, by a weighted reverse SDE.

    The path is ``prod_i q_{i,t}^{b_i}`` with B = sum b_i and the score s = sum b_i s_i. In y = x / alpha over u =
    (sigma / alpha)^2, which has no drift of its own,

        dy = (1 + zeta^2) / 2 s |du| + zeta sqrt(|du|) z,      dlog w = (|s|^2 - sum_i b_i |s_i|^2) / 2 |du|

    with any noise zeta. This covers annealing (one model, b), classifier-free guidance (b = 1 - scale for the model
    without and scale for the model with labels) and products of models. A reward of the noisy state tilts the path by
    ``exp(beta_t r(x))``, ``beta_t = strength (1 - t)^2``: half of the Langevin drift goes along ``beta_t grad r``
    (kappa = 1/2), and the weights grow by the change of ``beta_t r`` along the ODE, which needs no Laplacian. Weights
    are exact as steps shrink; at few steps the discretisation is the larger error.

    Where nothing is known yet (from alpha = 0, and for B != 1 while sigma / alpha is above 30) a step draws from the
    product of the models' Gaussians itself: the weights of coarse steps there would only be noise.

    Particles and weights of one model alone (b = 1, no scale, no reward) are ``ddim`` with eta=1.

    Args:
        particles: K trajectories a sample.
        exponents: b of the study's model, then of each of ``models``; left out ones are 1.
        models: specs of further models of the same process and shape, ``[{name: digits, path: DIR}]``.
        scale: guidance scale w of the study's model; null asks it once, with the row's label. Guidance itself must be
            none.
        strength: inverse temperature of the reward; null leaves it out.
        zeta2: zeta^2; null is ``max(1, 6 (1 - 1/B))``. Below ``1 - 1/B`` the weighted system does not settle at its
            target, below 5.83 (1 - 1/B) the weights' second moment grows along the path. The published choices are 1
            (target score) and 1/B (tempered noise).
        resampling: systematic, stratified, residual, multinomial, ssp; or jump: particles below the mean increment die
            with probability ``1 - exp(it)`` and are replaced by ones above it, which needs small steps.
        trigger: always (after every step but the last), ess or never; jump knows always only.
        threshold: share of K below which ess resamples.
        window: noise-to-signal ratios between which weights count; null is everywhere. High-dimensional weights
            degenerate, and a window keeps what they can correct; outside it the law is that of the plain SDE.
        clamp: largest distance of a step's increment from its group's mean; null clamps nothing. Clamping biases; the
            column ``clipped`` counts it.
        output: sample (a draw by weight) or all (with every particle in the column ``candidates``).
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts".
        The exponential step, the default of zeta^2 and the weight of the tilt along the ODE are ours.
    Cost: K T evaluations per model (twice for the guided one); no reward calls without a tilt, else 2 K T and as many
        gradients of the reward alone.
    Identities: with particles=1, one model, b = 1 and no reward this is ``single`` with ``ddim`` and eta=1, draw
        for draw; with another density and one particle it is the plain SDE, uncorrected.
    """

    particles: int = 16
    exponents: tuple[float, ...] = (1.0,)
    models: tuple[dict[str, Any], ...] = ()
    scale: float | None = None
    strength: float | None = None
    zeta2: float | None = None
    resampling: str = "systematic"
    trigger: str = "always"
    threshold: float = 0.5
    window: tuple[float, ...] | None = None
    clamp: float | None = None
    output: str = "sample"
    budget: dict[str, float] = field(default_factory=dict)

    semantics = "sample"

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"strategy.particles must be at least 1, got {self.particles}.")
        if not 1 <= len(self.exponents) <= 1 + len(self.models):
            raise ValueError(
                f"strategy.exponents must be one number for the study's model and one for each of the "
                f"{len(self.models)} further models, got {list(self.exponents)}."
            )
        if not self.total > 0:
            raise ValueError(f"strategy.exponents must have a positive sum, got {list(self.exponents)}.")
        for name in ("strength", "zeta2", "clamp"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"strategy.{name} must be positive or null, got {value}.")
        if self.window is not None and (len(self.window) != 2 or not 0 <= self.window[0] < self.window[1]):
            raise ValueError(
                f"strategy.window must be two noise-to-signal ratios [low, high], got {list(self.window)}."
            )
        if self.resampling == "jump" and self.trigger != "always":
            raise ValueError(
                f"resampling jump happens after every step. Set strategy.trigger=always, not {self.trigger}."
            )
        if self.output not in ("sample", "all"):
            raise registry.unknown("output", self.output, ["sample", "all"], "Allowed")
        _ = self.how

    @property
    def how(self) -> Resampling:
        """When and how, where it is no jump."""
        return Resampling("systematic" if self.resampling == "jump" else self.resampling, self.trigger, self.threshold)

    @property
    def powers(self) -> tuple[float, ...]:
        """b of the study's model, then of the further ones."""
        return (*self.exponents, *[1.0] * (1 + len(self.models) - len(self.exponents)))

    @property
    def asks_unlabelled(self) -> bool:
        """Whether it asks for predictions without a label."""
        return self.scale is not None

    @property
    def total(self) -> float:
        """B."""
        return sum(self.powers)

    @property
    def noise_level(self) -> float:
        """zeta^2."""
        return max(1.0, 6.0 * (1.0 - 1.0 / self.total)) if self.zeta2 is None else self.zeta2

    @property
    def intermediate(self) -> bool:
        """A tilt judges noisy states."""
        return self.strength is not None

    @property
    def uses_reward(self) -> bool:
        """Only for a tilt."""
        return self.strength is not None

    @property
    def branches(self) -> bool:
        """Resampling copies particles."""
        return self.particles > 1

    @property
    def revision(self) -> str | None:
        """The weights of the further models."""
        found = [registry.models.build(spec).revision for spec in self.models]
        return "/".join(found) if found else None

    def account(self, evaluations: Sequence[int]) -> Account:
        """One evaluation per model, step and particle, two for a guided model; 2 rewards of noisy states for a tilt."""
        asks = (2 if self.scale is not None else 1) + len(self.models)
        calls = 2 * self.particles * len(evaluations) if self.uses_reward else 0
        return Account(
            self.particles * asks * sum(evaluations), calls + (self.particles if self.uses_reward else 0), calls
        )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what would be ignored, and models that do not belong together."""
        parts, process = recipe.parts, recipe.parts.model.noising
        if recipe.solver != registry.solvers.complete({"name": "ddim", "eta": 1.0}):
            raise ValueError(
                f"strategy fkc takes weighted steps of its own, so solver {recipe.solver['name']} would be ignored. "
                "Set solver=ddim solver.eta=1, whose steps they are for one model alone."
            )
        if recipe.guidance["name"] != "none":
            raise ValueError(
                f"strategy fkc guides by itself, so that it can weigh it, but guidance is {recipe.guidance['name']}. "
                "Set guidance=none and strategy.scale."
            )
        if self.scale is not None and not recipe.has_labels:
            raise ValueError(f"strategy.scale={self.scale} needs labels, but this study has none. Set it to null.")
        for spec in self.models:
            other = registry.models.build(spec)
            if other.noising != process or tuple(other.shape) != tuple(parts.model.shape):
                raise ValueError(
                    f"strategy.models has {spec['name']} with process {other.noising} and shape {tuple(other.shape)}, "
                    f"but the study's model has {process} and {tuple(parts.model.shape)}. A product needs equal ones."
                )
        if self.uses_reward and not getattr(parts.reward, "differentiable", False):
            raise ValueError(
                f"strategy.strength tilts by the gradient of the reward, but {recipe.reward['name']} has none. Use a "
                "reward that is differentiable, or strategy=fk_steering."
            )
        if recipe.initial["name"] != "prior":
            raise ValueError(
                f"strategy fkc weighs particles from the prior on, but initial is {recipe.initial['name']}. Use prior."
            )
        kernels.check_falling(recipe)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """(B, *shape) samples with the columns of ``tasks.smc.outcome``, ``clipped`` (B,), and ``nfe`` for products."""
        count, steps = self.particles, sampler.num_steps
        wide, streams = sampler.repeat(count), noise.repeat(count)  # type: ignore[attr-defined]
        blend = _Blend(self, wide, str(noise.device))  # type: ignore[attr-defined]
        particles = smc.begin(wide, count, streams)
        # The prior is N(0, sigma^2); the product of its powers has the variance sigma^2 / B.
        narrow = replace(particles.state, x=particles.state.x / math.sqrt(self.total))
        particles = replace(particles, state=narrow)
        level = _level(sampler.model.process, sampler.times[0])
        start = torch.zeros_like(particles.log_w)
        if math.isfinite(level):
            start = start + self._start([torch.zeros_like(narrow.x)] * len(blend.powers), blend.powers, level)
        particles = particles.put(start=start).weigh(start)
        clipped = torch.zeros(len(particles.log_z), dtype=torch.int64, device=particles.log_w.device)
        for i in range(steps):
            particles, increment, more = self._step(particles, blend, reward, i, streams.at(i))
            clipped = clipped + more
            if i == steps - 1 or count == 1:
                particles = particles.weigh(increment)
            elif self.resampling == "jump":
                particles = _jump(particles, increment, noise.at(i))
            else:
                particles = particles.weigh(increment).resample(self.how, noise.at(i))
        x0 = particles.state.x
        decoded = wide.model.decode(x0, wide.cond) if reward is not None or self.output == "all" else None
        rewards = None if reward is None else reward(decoded, wide.cond)  # type: ignore[arg-type]
        result = smc.outcome(particles, x0, rewards, noise.at(steps), self.output, decoded)
        columns = {**result.columns, "clipped": clipped}
        if blend.others:
            columns["nfe"] = torch.full_like(clipped, self.account([1] * steps).nfe)
        return replace(result, columns=columns)

    def _step(
        self, particles: ParticleState, blend: _Blend, reward: Reward | None, i: int, streams: Noise
    ) -> tuple[ParticleState, Tensor, Tensor]:
        """Move every particle; with the increments of the log-weights (B K,) and how many were clamped (B,)."""
        sampler, process, total = blend.sampler, blend.sampler.model.process, self.total
        t, s = sampler.times[i], sampler.times[i + 1]
        x = particles.state.x
        powers, means = blend.powers, blend(x, t)
        mix = _sum(powers, means)
        fresh = self._fresh(process, t, s)
        if fresh:
            mean, std = (process.alpha(s) / total) * mix, process.sigma(s) / math.sqrt(total)
            start = self._start(means, powers, _level(process, s))
            increment, particles = start - particles.cache["start"], particles.put(start=start)
        else:
            mean, std = kernels.tempered(process, x, mix, t, s, total, self.noise_level)
            increment = self._weight(process, x, powers, means, t, s)
        if reward is not None:
            assert self.strength is not None
            before, after = self.strength * (1 - t) ** 2, self.strength * (1 - s) ** 2
            score, gradient = _gradient(sampler, reward, x)
            mean = mean + 0.5 * before * std**2 * gradient.to(mean.dtype)
        x_new = kernels.Kernel(mean, std).draw(streams)
        if reward is not None:
            # Where the step draws anew, the new state itself is weighed.
            carried = x_new if fresh else _ode(process, x, mix, t, s, total)
            moved = reward(sampler.model.decode(carried, sampler.cond), sampler.cond).double()
            increment = increment + after * moved - before * score
        grouped = increment.view(-1, self.particles)
        more = torch.zeros(len(grouped), dtype=torch.int64, device=x.device)
        if self.clamp is not None:
            centre = grouped.mean(1, keepdim=True)
            kept = (grouped - centre).clamp(-self.clamp, self.clamp)
            more = ((grouped - centre).abs() > self.clamp).sum(1)
            increment = (centre + kept).flatten()
        state = replace(particles.state, x=x_new, x0_hat=mix / total, step=i + 1)
        return replace(particles, state=state), increment, more

    def _weight(
        self, process: Any, x: Tensor, powers: Sequence[float], means: Sequence[Tensor], t: float, s: float
    ) -> Tensor:
        """Increment of the log-weights over a step, (B K,) float64."""
        level, level_s = _level(process, t), _level(process, s)
        if self.window is not None and not self.window[0] <= math.sqrt(level) <= self.window[1]:
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        y = x.double().flatten(1) / process.alpha(t)
        scores = [(m.double().flatten(1) - y) / level for m in means]
        gap = _sum(powers, scores).square().sum(1) - _sum(powers, [score.square().sum(1) for score in scores])
        # |s|^2 (1 + u) is held, which for unit Gaussians does not change; so the increment is finite at both ends.
        return 0.5 * gap * (1 + level) * (math.log1p(level) - math.log1p(level_s))

    def _fresh(self, process: Any, t: float, s: float) -> bool:
        """Whether a step draws the product of the models' Gaussians anew, because nothing is known yet."""
        return process.alpha(t) == 0 or (self.total != 1 and _level(process, s) > NOTHING_YET**2)

    def _start(self, means: Sequence[Tensor], powers: Sequence[float], level: float) -> Tensor:
        """log of the mass of the product of the first Gaussians ``N(m_i, level)^{b_i}``, of every particle."""
        dim = means[0][0].numel()
        total = self.total
        flat = [m.double().flatten(1) for m in means]
        centre = _sum(powers, flat) / total
        spread = _sum(powers, [(m - centre).square().sum(1) for m in flat])
        return 0.5 * dim * ((1 - total) * math.log(2 * math.pi * level) - math.log(total)) - spread / (2 * level)


def _sum(powers: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_i b_i values_i."""
    return torch.stack([p * value for p, value in zip(powers, values, strict=True)]).sum(0)


def _level(process: Any, t: float) -> float:
    """u = (sigma / alpha)^2."""
    return (process.sigma(t) / process.alpha(t)) ** 2 if process.alpha(t) > 0 else math.inf


class _Blend:
    """The clean predictions of all the models of a product at once, with their powers."""

    def __init__(self, strategy: FKC, sampler: Any, device: str) -> None:
        self.strategy, self.sampler = strategy, sampler
        rows = getattr(sampler.model, "max_rows", 2**31)
        loaded = [_load(json.dumps(spec, sort_keys=True), device) for spec in strategy.models]
        self.others = [CountedModel(model, rows) for model in loaded]

    @property
    def powers(self) -> list[float]:
        """b of every prediction."""
        first, *rest = self.strategy.powers
        scale = self.strategy.scale
        return [first, *rest] if scale is None else [first * (1 - scale), first * scale, *rest]

    def __call__(self, x: Tensor, t: float) -> list[Tensor]:
        model, cond = self.sampler.model, self.sampler.cond
        means = [] if self.strategy.scale is None else [model.denoise(x, t, torch.full_like(cond, model.num_classes))]
        means.append(model.denoise(x, t, cond))
        return means + [other.denoise(x, t, cond if other.num_classes else None) for other in self.others]


def _ode(process: Any, x: Tensor, mix: Tensor, t: float, s: float, total: float) -> Tensor:
    """Where ``dy = (X - B y) / (2 u) |du|`` carries x from t to s: the drift of a tilted product without its noise."""
    if process.sigma(s) == 0:
        return (process.alpha(s) / total) * mix
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    carry = alpha_s / alpha_t * ((process.sigma(s) * alpha_t) / (process.sigma(t) * alpha_s)) ** total
    return carry * x + ((alpha_s - alpha_t * carry) / total) * mix


def _gradient(sampler: Any, reward: Reward, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards of noisy states, (N,) float64, and their gradients."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        score = reward(sampler.model.decode(x, sampler.cond), sampler.cond).double()
        if not score.requires_grad:
            raise ValueError("the reward or the decoder cuts the gradient. Use strategy=fk_steering, which needs none.")
        (gradient,) = torch.autograd.grad(score.sum(), x)
    return score.detach(), gradient.double()


def _jump(particles: ParticleState, increment: Tensor, noise: Noise) -> ParticleState:
    """Replace particles below the mean increment at the rate of their deficit; the mean goes to log Z."""
    count = particles.num_particles
    grouped = increment.view(-1, count)
    mean = grouped.mean(1)
    excess = grouped - mean[:, None]
    dies = noise.uniform((count,), "resample") < -torch.expm1(excess.clamp(max=0))
    weights = excess.clamp(min=0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
    drawn = smc.invert(weights / weights.sum(1, keepdim=True), noise.uniform((count,), "replacement"))
    places = torch.arange(count, device=drawn.device).expand_as(drawn)
    due = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
    # Weights stay equal: what the increments said is spent by the jumps themselves.
    sizes = smc.effective_size(grouped)
    gain = mean + smc.log_mean_exp(particles.grouped)
    return replace(particles.moved_to(torch.where(dies, drawn, places), due, gain), ess=(*particles.ess, sizes))
