"""PFGM++: the electrostatic generalisation of the EDM process, with heavy-tailed noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.processes import EDM


@dataclass(frozen=True)
class PFGMpp(EDM):
    """PFGM++ process: the data lie on the plane r = 0 of an electric field in D more dimensions.

    At ``r = sigma sqrt(D)`` the perturbation kernel over N dimensions is ``p(x | y) ~ (|x - y|^2 + r^2)^-((N + D)/2)``,
    and the field lines ``dx/dr = (x - E[y | x]) / r`` are, in sigma, the ODE of EDM. So deterministic solvers, times
    and networks are those of EDM; only the posterior mean and the prior differ. D = 1 is PFGM, and D to infinity EDM.

    The kernel is that of Student's t with D degrees of freedom: ``x = y + sigma z sqrt(D / q)`` with z standard normal
    and q chi-square with D degrees. This is the published ``sigma sqrt(D) sqrt(B / (1 - B)) z / |z|`` with
    ``B ~ Beta(N/2, D/2)``, because ``|z|^2 / (|z|^2 + q)`` is such a B and does not depend on the direction of z. In
    this form a row needs one more number than in EDM, D need not be an integer, and draws tend to those of EDM.

    Args:
        sigma_min: smallest noise level that the network was trained for.
        sigma_max: noise level at t=1.
        aug_dim: number of augmented dimensions D, positive and finite.

    Reference: Xu et al. 2023, "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models", section 3
        (kernel and ODE) and appendix C.2 (r = sigma sqrt(D)).
    """

    aug_dim: float = 2048.0

    stochastic_ok = False  # no stochastic process with these marginals is known, only the field lines

    def __post_init__(self) -> None:
        if not 0 < self.aug_dim < math.inf:
            raise ValueError(
                f"aug_dim must be positive and finite, got {self.aug_dim}. The limit of infinity is the edm process."
            )

    def _heavy(self, shape: tuple[int, ...], noise: Any, purpose: str) -> Tensor:
        """Student's t with D degrees of freedom and unit scale, (B, *shape): normal draws and one radius a row."""
        from scipy.special import gammaincinv

        uniform = noise.uniform((), purpose=f"{purpose} radius").cpu().double().numpy()
        stretch = torch.from_numpy((0.5 * self.aug_dim / gammaincinv(0.5 * self.aug_dim, uniform)) ** 0.5)
        z = noise.normal(shape, purpose=purpose)
        return (stretch.to(z.device).view(-1, *[1] * len(shape)) * z.double()).to(z.dtype)

    def prior(self, shape: tuple[int, ...], noise: Any, t: float = 1.0) -> Tensor:
        """The kernel around the origin at time t, (B, *shape)."""
        return self.sigma(t) * self._heavy(shape, noise, "prior")

    def renoise(self, x: Tensor, s: float, t: float, noise: Any) -> Tensor:
        """Carry clean data, s = 0, to time t by the kernel, (B, *shape).

        Raises:
            ValueError: s > 0. Two kernels one after the other are not the kernel of a noisier time, and the right noise
                depends on the clean point.
        """
        if s == t:
            return x
        if s > 0:
            raise ValueError(
                f"a PFGM++ state at t={s:.6g} cannot be noised to t={t:.6g}: only clean data (t=0) can. Use times that "
                "decrease and a deterministic solver."
            )
        return x + self.sigma(t) * self._heavy(tuple(x.shape[1:]), noise, "renoise")
