"""What models with exact posteriors share: the processes they can have, and mixtures fitted to the digits."""

from __future__ import annotations

import numpy as np

from tasks.mean_reverting import MeanReverting
from tasks.processes import EDM, VP, Flow, GaussianProcess

PROCESSES: dict[str, GaussianProcess | MeanReverting] = {
    "vp": VP(),
    "edm": EDM(),
    "flow": Flow(),
    "mr": MeanReverting(),
}


def fit_digits(ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One Gaussian per digit, fitted to the 64 pixels: weights (10,), means (10, 64), covariances (10, 64, 64)."""
    from tasks.data import digits

    pixels, labels = digits.images().reshape(-1, 64).astype(np.float64), digits.labels()
    groups = [pixels[labels == k] for k in range(10)]
    covariances = np.stack([np.cov(g.T, bias=True) + ridge * np.eye(64) for g in groups])
    return np.array([len(g) for g in groups]) / len(pixels), np.stack([g.mean(0) for g in groups]), covariances
