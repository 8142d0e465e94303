"""Weighted particles: effective sample size, systematic resampling, and the log of the mean weight.

Weights are kept as logs in float64, (B, K): B rows of K particles each. Every row resamples by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean(log_w: Tensor) -> Tensor:
    """log of the mean weight of every row, (B,)."""
    return torch.logsumexp(log_w, dim=1) - math.log(log_w.shape[1])


def effective_size(log_w: Tensor) -> Tensor:
    """Effective sample size ``1 / sum W^2`` of every row, (B,), between 1 and K."""
    return 1.0 / torch.softmax(log_w, dim=1).square().sum(dim=1)


def systematic(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """Ancestors (B, K) in order: particle j is taken floor or ceil of ``K W_j`` times, on average ``K W_j`` times.

    Args:
        log_w: log weights, (B, K).
        uniforms: one uniform draw a row, (B,).

    Reference: Kitagawa 1996, "Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models".
    """
    particles = log_w.shape[1]
    cumulative = torch.softmax(log_w, dim=1).cumsum(dim=1)
    points = (torch.arange(particles, device=log_w.device) + uniforms[:, None]) / particles
    return torch.searchsorted(cumulative / cumulative[:, -1:], points, right=True).clamp(max=particles - 1)


def resample(log_w: Tensor, uniforms: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Resample the rows whose effective sample size is below ``threshold * K``; the others carry their weights on.

    Returns:
        index of every particle's ancestor among all, (B K,); log weights afterwards, (B, K); and what the log of the
        normaliser gains in every row, (B,).
    """
    rows, particles = log_w.shape
    triggered = effective_size(log_w) < threshold * particles
    stay = torch.arange(particles, device=log_w.device).expand(rows, -1)
    ancestors = torch.where(triggered[:, None], systematic(log_w, uniforms), stay)
    index = ancestors + particles * torch.arange(rows, device=log_w.device)[:, None]
    gained = torch.where(triggered, log_mean(log_w), 0.0)
    return index.flatten(), torch.where(triggered[:, None], 0.0, log_w), gained


def choose(log_w: Tensor, uniforms: Tensor) -> Tensor:
    """One particle of every row drawn by its weight: its index among all, (B,)."""
    rows, particles = log_w.shape
    cumulative = torch.softmax(log_w, dim=1).cumsum(dim=1)
    place = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=1).clamp(max=particles - 1)
    return place + particles * torch.arange(rows, device=log_w.device)


def unique(origin: Tensor) -> Tensor:
    """How many different values every row has, (B,) int64."""
    ordered = origin.sort(dim=1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1)
