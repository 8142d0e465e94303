"""Gradient ascent on the starting noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tasks.account import Account
from tasks.continuing import run_from
from tasks.registry import strategies
from tasks.types import Noise, Reward, Samples, State


@strategies.register("noise_gradient")
@dataclass(frozen=True)
class NoiseGradient:
    """Gradient ascent on the starting noise, through all steps of the sampler.

    ``n <- n + rate clip(grad [strength r(x_0(n)) + shell ((D - 1) log |n| - |n|^2 / 2)])``, where the second term is
    the log density of a Gaussian's length, which keeps the noise on the shell where starting noise lies. The sample
    with the largest reward of all iterations is returned, so more iterations never lower it. The noise of a stochastic
    solver's steps is held fixed.

    Args:
        iterations: gradient steps.
        rate: length of a step.
        strength: weight of the reward.
        shell: weight of the pull towards the Gaussian shell.
        clip: largest length of a gradient.
        checkpointing: keep only the states between steps and run each step again on the way back: memory of one step
            instead of all, for one more evaluation a step.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Eyring et al. 2024, "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise
        Optimization", eq. 6; Ben-Hamu et al. 2024, "D-Flow" (through many steps, with checkpointing); Samuel et al.
        2023 (the density of the length).
    Cost: a trajectory and a backward pass a step for every iteration, twice the evaluations with checkpointing, and one
        more trajectory; ``iterations + 1`` reward calls.
    Identities: with iterations=0 this is ``single``.
    """

    iterations: int = 5
    rate: float = 1.0
    strength: float = 1.0
    shell: float = 0.01
    clip: float = 1.0
    checkpointing: bool = True
    budget: dict[str, float] = field(default_factory=dict)

    particles = 1
    branches = False
    intermediate = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise ValueError(f"strategy.strength must be above 0, got {self.strength}.")
        if self.iterations < 0 or self.rate <= 0 or self.clip <= 0 or self.shell < 0:
            raise ValueError(
                "noise_gradient needs iterations >= 0, rate > 0, clip > 0 and shell >= 0, got "
                f"{self.iterations}, {self.rate}, {self.clip} and {self.shell}."
            )

    @property
    def uses_reward(self) -> bool:
        """Without iterations there is nothing to climb."""
        return self.iterations > 0

    def check_recipe(self, recipe: Any) -> None:
        """A differentiable reward of Gaussian starting noise.

        Raises:
            ValueError: says what is missing.
        """
        p = recipe.parts
        if p.model.noising.kind != "gaussian" or recipe.initial["name"] != "prior":
            raise ValueError(
                f"strategy noise_gradient climbs in Gaussian starting noise, but model {recipe.model['name']} is "
                f"{p.model.noising.kind} and initial is {recipe.initial['name']}. Use another model, or initial=prior."
            )
        if self.iterations and not getattr(p.reward, "differentiable", False):
            raise ValueError(
                f"strategy noise_gradient needs a differentiable reward, but {recipe.reward['name']} is none. Use "
                "class_log_prob, ink, symmetry, quadratic or linear, or strategy=noise_search."
            )
        if recipe.grid[1] is not None:
            raise ValueError(
                "strategy noise_gradient cannot see through a stock scheduler. Use one of Solvus's solvers."
            )

    def account(self, evaluations: Sequence[int]) -> Account:
        """Forward, and backward with its repetition, for every iteration; forward once more."""
        each, calls = sum(evaluations), self.iterations + 1 if self.iterations else 0
        nfe = each * (1 + self.iterations * (2 if self.checkpointing else 1))
        return Account(nfe, calls, calls, self.iterations * each)

    def _sample(self, sampler: Any, x: Tensor, noise: Noise) -> Tensor:
        """x_0 as a differentiable function of the state at the start."""
        if not self.checkpointing:
            return run_from(sampler, x, noise).x
        state = State(x, None, sampler._memory(0), 0)
        for _ in range(sampler.num_steps):
            state = checkpoint(sampler.step, state, noise, use_reentrant=False, preserve_rng_state=False)
        return state.x

    def _gradient(self, noises: Tensor, value: Tensor) -> Tensor:
        """The clipped gradient of each row's objective; rows do not touch each other, so their sum has them all."""
        length = noises.flatten(1).norm(dim=1)
        dim = noises[0].numel()
        shell = (dim - 1) * torch.log(length) - 0.5 * length**2
        total = self.strength * value.double() + self.shell * shell.double()
        (gradient,) = torch.autograd.grad(total.sum(), noises)
        size = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        return gradient * (self.clip / size).clamp(max=1.0).view(-1, *[1] * (noises.dim() - 1))

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards`` (B, iterations + 1), ``slot`` and the last ``noise_length`` (B,)."""
        if self.iterations == 0:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        std = sampler.model.process.prior_std(sampler.times[0])
        noises = noise.at(-1).normal(tuple(sampler.model.shape), purpose="prior")
        samples, rewards = [], []
        for iteration in range(self.iterations + 1):
            climbing = iteration < self.iterations
            # Generation runs without gradients; only this much of it needs them.
            with torch.set_grad_enabled(climbing):
                start = noises.detach().requires_grad_(climbing)
                x0 = self._sample(sampler, std * start, noise) if climbing else run_from(sampler, std * start, noise).x
                value = reward(sampler.model.decode(x0, sampler.cond), sampler.cond)
                if climbing:
                    noises = noises + self.rate * self._gradient(start, value).to(noises.dtype)
            samples.append(x0.detach())
            rewards.append(value.detach())
        table = torch.stack(rewards, dim=1)
        slot = table.argmax(dim=1)
        x0 = torch.stack(samples, dim=1)[torch.arange(len(slot), device=slot.device), slot]
        length = noises.flatten(1).norm(dim=1).double()
        return Samples(x0, {"candidate_rewards": table, "slot": slot, "noise_length": length})
