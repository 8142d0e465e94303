"""Rows divided into parts that are all alike, as a function of the row alone."""

from __future__ import annotations

import numpy as np


def part_of(position: np.ndarray, parts: int) -> np.ndarray:
    """The part of every row, 0 to parts - 1, as if drawn at random; (B,) int64.

    Not the position modulo parts: labels and prompts take turns too, and with as many of them as parts every part would
    hold one of them alone.

    Reference: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64's last steps).
    """
    x = position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(parts)).astype(np.int64)
