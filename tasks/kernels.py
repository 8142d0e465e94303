"""Reverse kernels p(x_s | x_t) as Gaussians: what strategies need that weigh a move or change its proposal.

With ``q = (sigma_s alpha_t / (sigma_t alpha_s))^2``, the ratio of the squared noise-to-signal ratios, every kernel here
is ``x_s ~ N(mean, std^2 I)``. A solver that has one offers ``kernel(process, x, x0_hat, t, s) -> (mean, std)`` and
draws its own steps from it, so that a strategy's account of a step is that of the solver. Log-densities are summed over
all dimensions of a particle, in float64; the normaliser and the ratio of two kernels of one step share std.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tasks import registry
from tasks.types import Noise


@dataclass(frozen=True)
class Kernel:
    """A Gaussian reverse kernel.

    Attributes:
        mean: (N, *shape).
        std: standard deviation, the same in every direction; 0 is a deterministic step.
    """

    mean: Tensor
    std: float

    def draw(self, noise: Noise) -> Tensor:
        """x_s, (N, *shape), from the normal draws that a solver's step uses."""
        if self.std == 0:
            return self.mean
        return self.mean + self.std * noise.normal(tuple(self.mean.shape[1:]), purpose="step")

    def log_prob(self, x: Tensor) -> Tensor:
        """log density of x, summed over dimensions, (N,) float64."""
        assert self.std > 0, "a deterministic step has no density"
        z = (x.double() - self.mean.double()).flatten(1) / self.std
        return -0.5 * z.square().sum(1) - z.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.std))

    def twisted(self, gradient: Tensor) -> Kernel:
        """The proposal that follows ``gradient`` of a log-value: ``N(mean + std^2 gradient, std^2 I)``."""
        return replace(self, mean=self.mean + (self.std**2 * gradient).to(self.mean.dtype))


def log_ratio(base: Kernel, proposal: Kernel, x: Tensor) -> Tensor:
    """log p(x) - log q(x) of two kernels with one std, (N,) float64; 0 for a deterministic step.

    ``<m_p - m_q, x - (m_p + m_q) / 2> / std^2``: the difference of two large squares would lose the digits that matter
    in high dimension.
    """
    if base.std == 0:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)
    assert base.std == proposal.std, "the proposal moves the mean only"
    p, q = base.mean.double(), proposal.mean.double()
    return ((p - q) * (x.double() - 0.5 * (p + q))).flatten(1).sum(1) / base.std**2


def ddim(process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float, eta: float) -> tuple[Tensor, float]:
    """DDIM on any schedule: mean and standard deviation.

    ``mean = alpha_s x0_hat + sqrt(sigma_s^2 - nu^2) eps_hat`` and ``std = nu = eta (sigma_s / sigma_t) sqrt(sigma_t^2 -
    (alpha_t / alpha_s)^2 sigma_s^2)``. With eta=1 it is ancestral sampling, with eta=0 an ODE step.

    Args:
        process: noising process.
        x: states at t, (N, *shape).
        x0_hat: clean predictions there.
        t: time of the states.
        s: time to go to.
        eta: share of the ancestral noise.

    Reference: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    ratio = alpha_t / alpha_s
    nu = eta * sigma_s / sigma_t * math.sqrt(max(sigma_t**2 - (ratio * sigma_s) ** 2, 0.0))
    carry = math.sqrt(max(sigma_s**2 - nu**2, 0.0)) / sigma_t
    return carry * x + (alpha_s - alpha_t * carry) * x0_hat, nu


def flow_sde(x: Tensor, x0_hat: Tensor, t: float, s: float, g2: float) -> tuple[Tensor, float]:
    """Euler-Maruyama on the SDE with a rectified flow's marginals and diffusion g: mean and standard deviation.

    With u = (x - x0_hat) / t and dt = s - t < 0: ``mean = x (1 + g^2 dt / (2 t)) + u (1 + g^2 (1 - t) / (2 t)) dt`` and
    ``std = g sqrt(-dt)``. The marginals are kept in the limit of many steps only.

    Args:
        x: states at t, (N, *shape).
        x0_hat: clean predictions there.
        t: time of the states.
        s: time to go to.
        g2: squared diffusion at the step.

    Reference: Liu et al. 2025, "Flow-GRPO", eq. 9.
    """
    velocity = (x - x0_hat) / t
    dt = s - t
    mean = x * (1.0 + g2 * dt / (2 * t)) + velocity * ((1.0 + g2 * (1.0 - t) / (2 * t)) * dt)
    return mean, math.sqrt(-g2 * dt)


def tempered(
    process: Any, x: Tensor, blend: Tensor, t: float, s: float, total: float, zeta2: float
) -> tuple[Tensor, float]:
    """The reverse SDE of a product of densities ``prod_i q_{i,t}^{b_i}``, with noise zeta: mean and standard deviation.

    In y = x / alpha over u = (sigma / alpha)^2 the score is ``(X - B y) / u`` with ``X = sum_i b_i x0_hat_i`` and ``B =
    sum_i b_i``, so ``dy = (1 + zeta^2) / 2 (X - B y) / u |du| + zeta sqrt(|du|) z`` is linear once X is held. Its exact
    solution, with ``a = (1 + zeta^2) B - 1``:

        mean = alpha_s X / B + (sigma_s / sigma_t) q^(a / 2) (x - alpha_t X / B),
        std^2 = sigma_s^2 zeta^2 (1 - q^a) / a.

    Args:
        process: noising process.
        x: states at t, (N, *shape).
        blend: X, (N, *shape).
        t: time of the states.
        s: time to go to.
        total: B > 0.
        zeta2: zeta^2 > 0.

    Reference: Skreta et al. 2025, "Feynman-Kac Correctors in Diffusion" (the SDE); the exact solution is ours.
    Identities: with B = 1 and zeta = 1 this is ``ddim`` with eta=1.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    if alpha_t == 0:
        assert total == 1, "from no signal the law of a product is its own Gaussians'"
        return alpha_s * blend, sigma_s
    if sigma_s == 0:
        return (alpha_s / total) * blend, 0.0
    q = (sigma_s * alpha_t / (sigma_t * alpha_s)) ** 2
    a = (1.0 + zeta2) * total - 1.0
    spread = -math.log(q) if a == 0 else -math.expm1(a * math.log(q)) / a
    carry = sigma_s / sigma_t * q ** (a / 2)
    return carry * x + ((alpha_s - alpha_t * carry) / total) * blend, sigma_s * math.sqrt(zeta2 * spread)


def has_kernel(solver: Any) -> bool:
    """Whether a solver's steps are Gaussian kernels that a strategy may weigh."""
    return hasattr(solver, "kernel")


def kernel_of(sampler: Any, x: Tensor, x0_hat: Tensor, step: int) -> Kernel:
    """The kernel of one step of a sampler's own solver, given the clean prediction at its start."""
    t, s = sampler.times[step], sampler.times[step + 1]
    return Kernel(*sampler.solver.kernel(sampler.model.process, x, x0_hat, t, s))


def check_kernel(recipe: Any) -> None:
    """Refuse a solver whose steps have no density; and grids that rise, where a step is no solver's.

    Raises:
        ValueError: names the solvers that fit.
    """
    solver, name = recipe.parts.solver, recipe.strategy["name"]
    if not has_kernel(solver):
        fitting = [n for n in registry.solvers.names() if has_kernel(registry.solvers.get(n))]
        raise ValueError(
            f"strategy {name} weighs every step by its density, but solver {recipe.solver['name']} has none. Solvers "
            f"that fit: {', '.join(fitting)}, for example solver=ddim solver.eta=1."
        )
    if getattr(solver, "window", None) is not None:
        raise ValueError(f"strategy {name} needs every step to be stochastic. Set solver.window=null.")
    check_falling(recipe)


def check_falling(recipe: Any) -> None:
    """Refuse grids that jump back."""
    if getattr(recipe.parts.times, "travels", False):
        raise ValueError(
            f"strategy {recipe.strategy['name']} needs times that fall, but times {recipe.times['name']} jump back. "
            "Use times=uniform, for example."
        )


# --- predictions that are asked for once -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Primed:
    """A model that already knows its answer at one tensor of states.

    A strategy that scores particles by their clean predictions has paid for them; the solver's step from the same
    states is then free.
    """

    model: Any
    x: Tensor
    x0_hat: Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "model"), name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The answer that is known, or the model's own."""
        return self.x0_hat if x is self.x else self.model.denoise(x, t, cond)


def primed(sampler: Any, x: Tensor, x0_hat: Tensor) -> Any:
    """The sampler whose next step, from ``x``, needs no evaluation."""
    return replace(sampler, model=Primed(sampler.model, x, x0_hat))


def check_asks_once(recipe: Any) -> None:
    """Refuse solvers that evaluate elsewhere than at the state, or more than once: their steps cannot be primed.

    Raises:
        ValueError: names the solvers that fit.
    """
    if not getattr(recipe.parts.solver, "asks_once", False):
        kind, known = recipe.parts.model.noising.kind, registry.solvers
        of_kind = [n for n in known.names() if hasattr(known.get(n), "asks_once") and known.build(n).process == kind]
        fitting = [n for n in of_kind if known.build(n).asks_once]
        raise ValueError(
            f"strategy {recipe.strategy['name']} scores a particle by its own prediction and gives it to the step, but "
            f"a step of solver {recipe.solver['name']} is more than one evaluation at its state. Solvers that fit: "
            f"{', '.join(fitting)}."
        )
    check_falling(recipe)
