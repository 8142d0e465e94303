"""Paths between data and noise on which a flow model can be run, whichever path it was trained on.

A path has ``x_r = a(r) x_0 + b(r) eps``. A model trained on the straight path (1 - t, t) answers for a state of any
other one at the same signal-to-noise ratio: ``t = b / (a + b)`` and ``x_t = x_r / (a + b)``. Its clean prediction is
that of the path too, so velocity ``a' x0_hat + b' eps_hat`` and score ``-eps_hat / b`` follow, and with them an SDE
that keeps the path's marginals for every diffusion g:

    x_s = x - (u - g^2 score / 2) (r - s) + g sqrt(r - s) z.

Reference: Kim et al. 2025, "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget
Forcing", sections 4.2 and 4.3; Albergo et al. 2023, "Stochastic Interpolants".
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0
NAMES = ("linear", "vp")


def coefficients(name: str, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b and their derivatives at times r, float64.

    ``linear`` is (1 - r, r); ``vp`` is ``a = exp(-(r^2 (beta_1 - beta_0) / 2 + beta_0 r) / 2)``, ``b = sqrt(1 - a^2)``.
    """
    r = r.double()
    if name == "linear":
        return 1.0 - r, r, -torch.ones_like(r), torch.ones_like(r)
    exponent = 0.5 * r**2 * (BETA_MAX - BETA_MIN) + BETA_MIN * r
    beta = r * (BETA_MAX - BETA_MIN) + BETA_MIN
    a, b = torch.exp(-0.5 * exponent), torch.sqrt(-torch.expm1(-exponent))
    return a, b, -0.5 * beta * a, 0.5 * beta * a**2 / b


def matched(name: str, r: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path's time of equal signal-to-noise ratio, and the scale a + b; both float64."""
    a, b, _, _ = coefficients(name, r)
    return b / (a + b), a + b


def _wide(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def predict(model: object, name: str, x: Tensor, r: Tensor, cond: Tensor | None) -> Tensor:
    """The clean prediction of a straight-path model at states of this path, (B, *shape); r is (B,)."""
    t, scale = matched(name, r)
    return model.denoise(x / _wide(scale, x), t, cond)  # type: ignore[attr-defined]


def sde_step(name: str, x: Tensor, x0_hat: Tensor, r: Tensor, s: Tensor, g: Tensor, z: Tensor) -> Tensor:
    """From r to s < r with diffusion g, (B, *shape); r, s and g are (B,), z standard normal. g = 0 is the ODE."""
    a, b, da, db = (_wide(value, x) for value in coefficients(name, r))
    eps = (x - a * x0_hat) / b
    velocity, score = da * x0_hat + db * eps, -eps / b
    gap, g = _wide(r.double() - s.double(), x), _wide(g, x)
    return x - (velocity - 0.5 * g**2 * score) * gap + g * torch.sqrt(gap) * z
