"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels with 17 levels, and their labels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LEVELS = 17
SIDE = 8


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8.0 - 1.0).astype(np.float32)[:, None]
    return images, data.target.astype(np.int64)


def images() -> np.ndarray:
    """All images in [-1, 1], (1797, 1, 8, 8) float32."""
    return _load()[0]


def labels() -> np.ndarray:
    """The digit of every image, (1797,) int64."""
    return _load()[1]


def tokens() -> np.ndarray:
    """The grey level of every pixel in raster order, (1797, 64) int64 from 0 (paper) to 16 (ink)."""
    return np.rint((images().reshape(-1, SIDE * SIDE) + 1.0) * 8.0).astype(np.int64)


def held_out(fraction: float = 0.2, seed: int = 0) -> np.ndarray:
    """A fixed mask of test images, (1797,) bool; the classifier and the token models never train on them."""
    return np.random.default_rng(seed).random(len(labels())) < fraction
