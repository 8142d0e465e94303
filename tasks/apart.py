"""What strategies share whose particles keep apart: directions away from those before, and the choice at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.lookahead import rows_of
from tasks.types import Noise, Reward, Samples, reindex


def residuals(features: Tensor) -> Tensor:
    """Unit parts of vectors orthogonal to those before them: (B, K, F) -> (B, K, F); zero for the first of each row."""
    outward, basis = torch.zeros_like(features), torch.zeros_like(features)
    for k in range(features.shape[1]):
        rest = features[:, k]
        for j in range(k):  # one by one, as modified Gram-Schmidt, which loses less to rounding
            rest = rest - (rest * basis[:, j]).sum(-1, keepdim=True) * basis[:, j]
        size = rest.norm(dim=-1, keepdim=True)
        basis[:, k] = torch.where(size > 1e-6, rest / size.clamp_min(1e-12), 0.0)
        if k:
            outward[:, k] = basis[:, k]
    return outward


def chosen(wide: Any, reward: Reward | None, noise: Noise, particles: int, pick: int | None) -> Samples:
    """Run K particles of every row and return one.

    Args:
        wide: a sampler of B rows of K particles.
        reward: whose largest value is returned; None returns the particle ``pick``.
        noise: of the B rows.
        particles: K.
        pick: number of the particle to return.

    Returns:
        (B, *shape) samples with columns ``spread`` (B,), the mean Euclidean distance of a row's final states; with a
        reward ``candidate_rewards`` (B, K) and ``slot`` (B,).
    """
    x0 = wide.run(noise.repeat(particles)).x
    groups = x0.flatten(1).double().view(-1, particles, x0[0].numel())
    distances = (groups[:, :, None] - groups[:, None]).square().sum(-1).sqrt().sum((1, 2))
    columns = {"spread": distances / (particles * (particles - 1))}
    if reward is not None:
        rewards = reward(wide.model.decode(x0, wide.cond), wide.cond).view(-1, particles)
        slot = rewards.argmax(dim=1)
        columns |= {"candidate_rewards": rewards, "slot": slot}
    else:
        slot = torch.full((len(groups),), pick or 0, dtype=torch.int64, device=x0.device)
    return Samples(reindex(x0, rows_of(slot[:, None], particles)), columns)
