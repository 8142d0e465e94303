"""Squared maximum mean discrepancy between two sets of features, under any kernel, and each row's effect on it.

``MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)``. The unbiased estimate leaves out the pairs of a row with itself.

Reference: Gretton et al. 2012, "A Kernel Two-Sample Test", eqs. 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
BLOCK = 1024  # rows of a kernel matrix that are held at a time


def row_means(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    """``mean_j k(x_i, y_j)``, (len(x),)."""
    return np.concatenate([kernel(x[i : i + BLOCK], y).mean(axis=1) for i in range(0, len(x), BLOCK)])


def own_means(x: np.ndarray, kernel: Kernel, unbiased: bool) -> np.ndarray:
    """``mean_j k(x_i, x_j)``, (len(x),), over the other rows or over all of them."""
    found = row_means(x, x, kernel)
    if not unbiased:
        return found
    own = np.array([kernel(row[None], row[None])[0, 0] for row in x])
    return (len(x) * found - own) / (len(x) - 1)


def value_and_effects(
    x: np.ndarray, y: np.ndarray, within: float, kernel: Kernel, unbiased: bool
) -> tuple[float, np.ndarray]:
    """The discrepancy, and the first-order effect of every row of x on it (Hoeffding's projection), (len(x),).

    Args:
        x, y: features (n, D) and (m, D), float64.
        within: mean of the kernel within y.
        kernel: (a, b) -> (len(a), len(b)).
        unbiased: whether pairs of a row with itself are left out.
    """
    own, cross = own_means(x, kernel, unbiased), row_means(x, y, kernel)
    effects = 2.0 * (own - cross - (own.mean() - cross.mean()))
    return float(own.mean() + within - 2.0 * cross.mean()), effects
