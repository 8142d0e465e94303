"""Gaussian statistics of a model's data, and the exact probability-flow trajectory of that Gaussian.

For data N(mu, U diag(v) U^T) the flow is linear: along eigenvector k the deviation from alpha mu scales with
``sqrt(alpha^2 v_k + sigma^2)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def gaussian_statistics(x0: Tensor, labels: Tensor | None, num_classes: int, rank: int | None) -> dict[str, np.ndarray]:
    """Mean, eigenvectors and eigenvalues of samples, per class where there are labels and once over all.

    Args:
        x0: samples, (N, *shape).
        labels: their labels, (N,), or None.
        num_classes: number of labels K.
        rank: leading directions that are kept; the rest share the mean of what is left. None keeps all.

    Returns:
        ``mean`` (K + 1, D), ``vectors`` (K + 1, D, R), ``values`` (K + 1, R), ``tail`` (K + 1,); the last is over all.
    """
    flat = x0.flatten(1).double().cpu().numpy()
    groups = [flat]
    if labels is not None and num_classes:
        marks = labels.cpu().numpy()
        groups = [flat[marks == k] if (marks == k).sum() > 1 else flat for k in range(num_classes)] + [flat]
    dim = flat.shape[1]
    keep = dim if rank is None else min(rank, dim)
    found: dict[str, list[np.ndarray]] = {"mean": [], "vectors": [], "values": [], "tail": []}
    for group in groups:
        mean = group.mean(axis=0)
        # The singular vectors of the centred data: right for more dimensions than samples, too.
        _, singular, rows = np.linalg.svd(group - mean, full_matrices=len(group) < dim and keep == dim)
        values = np.zeros(dim)
        values[: len(singular)] = singular**2 / len(group)
        vectors = rows.T[:, :keep] if rows.shape[0] >= keep else np.pad(rows.T, ((0, 0), (0, keep - rows.shape[0])))
        found["mean"].append(mean)
        found["vectors"].append(vectors)
        found["values"].append(values[:keep])
        found["tail"].append(np.array(values[keep:].mean() if keep < dim else 0.0))
    return {name: np.stack(value) for name, value in found.items()}


def pick(statistics: dict[str, np.ndarray], cond: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """The statistics of every row's class, or one row of those over all; float64."""
    count = len(statistics["mean"])
    found = {name: torch.from_numpy(np.asarray(value)).to(like.device) for name, value in statistics.items()}
    if cond is None or count == 1:
        return {name: value[-1:] for name, value in found.items()}
    index = cond.clamp(max=count - 1)
    return {name: value[index] for name, value in found.items()}


def flow(process: Any, x: Tensor, t: float, s: float, chosen: dict[str, Tensor]) -> Tensor:
    """Carry x along the exact trajectory of the Gaussian from t to s; (B, *shape) in x's dtype.

    Reference: Wang and Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion
        Models".
    """
    alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
    offset = x.flatten(1).double() - alpha_t * chosen["mean"]
    along = torch.einsum("bd,bdr->br", offset, chosen["vectors"].expand(len(x), -1, -1))
    gain = ((alpha_s**2 * chosen["values"] + sigma_s**2) / (alpha_t**2 * chosen["values"] + sigma_t**2)).sqrt()
    tail = ((alpha_s**2 * chosen["tail"] + sigma_s**2) / (alpha_t**2 * chosen["tail"] + sigma_t**2)).sqrt()[:, None]
    inside = torch.einsum("br,bdr->bd", along * (gain - tail), chosen["vectors"].expand(len(x), -1, -1))
    moved = alpha_s * chosen["mean"] + tail * offset + inside
    return moved.reshape(x.shape).to(x.dtype)


def log_density(x: Tensor, rho: Tensor, chosen: dict[str, Tensor]) -> Tensor:
    """log N(x; mu, Sigma + rho^2 I) of x = x_0 + rho eps, for every row and level: x (B, D), rho (B, L) -> (B, L)."""
    offset = x.double() - chosen["mean"]
    along = torch.einsum("bd,bdr->br", offset, chosen["vectors"].expand(len(x), -1, -1))
    rest = (offset.square().sum(1) - along.square().sum(1)).clamp(min=0.0)[:, None]
    variance = chosen["values"][:, None, :] + rho.square()[:, :, None]  # (B, L, R)
    tail = chosen["tail"][:, None] + rho.square()
    missing = x.shape[1] - chosen["values"].shape[-1]
    quadratic = (along.square()[:, None, :] / variance).sum(-1) + rest / tail
    return -0.5 * (quadratic + variance.log().sum(-1) + missing * tail.log())
