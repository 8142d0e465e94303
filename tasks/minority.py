"""How much of a sample is lost when it is noised and predicted back: large where the data is sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.processes import expand
from tasks.types import Noise


def minority_score(model: Any, x0: Tensor, cond: Tensor | None, time: float, draws: int, noise: Noise) -> Tensor:
    """``m(x0) = mean over eps of |x0 - x0_hat(alpha x0 + sigma eps)|^2``, averaged over the elements of a sample too.

    Args:
        model: the denoiser.
        x0: clean samples, (B, *shape).
        cond: their labels, (B,), or None.
        time: noise level t; the larger, the more m follows -log p and the less the details.
        draws: number of noises.
        noise: streams of the rows.

    Returns:
        (B,) float64.

    Reference: Um et al. 2024, "Don't Play Favorites: Minority Guidance for Diffusion Models", with the mean
        square in place of LPIPS.
    """
    process = model.process
    alpha, sigma = expand(process.alpha(time), x0), expand(process.sigma(time), x0)
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for k in range(draws):
        eps = noise.normal(tuple(x0.shape[1:]), f"minority/{k}").to(x0.dtype)
        again = model.denoise(alpha * x0 + sigma * eps, time, cond)
        total = total + (x0 - again).double().square().flatten(1).mean(dim=1)
    return total / draws
