"""Distances between rows in blocks, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 512  # rows whose distances to all others are held at a time


def squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, squared distances (b, len(y))) of every block of x, float64, never negative."""
    centre = y.mean(axis=0)  # far from the origin, |x|^2 + |y|^2 - 2 x.y loses its digits
    x, y = x - centre, y - centre
    lengths = np.square(y).sum(axis=1)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        found = np.square(part).sum(axis=1)[:, None] + lengths - 2.0 * part @ y.T
        yield start, np.clip(found, 0.0, None)


def nearest_others(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every row's k nearest other rows: squared distances (n, k) in rising order, and their places (n, k)."""
    distances, places = np.empty((len(x), k)), np.empty((len(x), k), dtype=np.int64)
    for start, block in squared_distances(x, x):
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf  # no row is its own neighbour
        near = np.argpartition(block, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(block, near, axis=1)
        order = np.argsort(found, axis=1, kind="stable")
        distances[start : start + len(block)] = np.take_along_axis(found, order, axis=1)
        places[start : start + len(block)] = np.take_along_axis(near, order, axis=1)
    return distances, places


def nearest(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distance of every row of x to the nearest row of y, (len(x),)."""
    return np.concatenate([block.min(axis=1) for _, block in squared_distances(x, y)])
