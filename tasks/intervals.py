"""Standard errors from rows' effects, for independent rows and for rows in clusters; and tests of many differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # standard errors to either side of a value in its 95 % interval, under the normal law


def clustered(effects: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """One effect a cluster, (G,), in the order of the sorted clusters: of G independent things, as rows' are of n.

    The effects of a cluster's rows are added up and scaled by G / n, so the value is again about the mean of G effects.
    """
    names, place = np.unique(clusters, return_inverse=True)
    return np.bincount(place, effects, minlength=len(names)) * (len(names) / len(effects))


def standard_error(effects: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """Standard error of a value of which every row's first-order effect is known (the infinitesimal jackknife).

    For independent rows ``std(effects) / sqrt(n)``. With clusters (all samples of one prompt or label) it holds for new
    clusters, too: ``sqrt(G / (G - 1) sum_g (sum of the centred effects in g)^2) / n``. With every row a cluster of its
    own the two are equal; rows that are alike in a cluster make it larger, up to sqrt(n / G) times.

    Args:
        effects: (n,); rows that are not finite are not used.
        clusters: the cluster of every row, (n,), of any type; None for independent rows.

    Returns:
        NaN for fewer than two rows or clusters.

    Reference: Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans"; Liang and Zeger 1986 (clusters).
    """
    used = np.isfinite(effects)
    found = effects[used]
    if len(found) > 1 and clusters is not None:
        found = clustered(found - found.mean(), clusters[used])
    if len(found) < 2:
        return math.nan
    return float(found.std(ddof=1)) / math.sqrt(len(found))


def two_sided(difference: float, error: float) -> float:
    """p-value of a difference with a standard error under the normal law; 1 for no difference without doubt."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being many, in their order: the chance of any false finding is at most the level.

    The i-th smallest of m is multiplied by m - i + 1, and none is less than a smaller one's. Holds whatever the tests'
    dependence, and finds all that Bonferroni's correction finds.

    Reference: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted
