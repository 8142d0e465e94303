"""Which samples lie among the data and which data among the samples, by balls that reach to the k-th neighbour.

Precision and density are means over samples, so a row's effect on them is its own deviation. Recall and coverage count
items of the data and are no smooth functions of the samples: there a row's effect is what leaving it out really
changes (the jackknife), by which the standard error is on the safe side (Efron and Stein 1981).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.neighbours import nearest_others, squared_distances


@dataclass(frozen=True)
class Overlap:
    """Four values, and every sample's effect on each, (M,) with mean zero."""

    values: dict[str, float]
    effects: dict[str, np.ndarray]


def overlap(samples: np.ndarray, data: np.ndarray, radius: np.ndarray, k: int) -> Overlap:
    """Precision, recall, density and coverage.

    Args:
        samples: features of the samples, (M, D) with M > k + 1.
        data: features of the data, (N, D).
        radius: squared distance of every item of the data to its k-th nearest other one, (N,).
        k: which neighbour a ball reaches to; a ball is open.
    """
    reach, neighbours = nearest_others(samples, k + 1)
    count, items = len(samples), len(data)
    inside = np.zeros(count)  # balls of the data that hold a sample
    held, holder = np.zeros(items, dtype=np.int64), np.zeros(items, dtype=np.int64)  # samples in an item's ball
    seen, seer = np.zeros(items, dtype=np.int64), np.zeros(items, dtype=np.int64)  # samples' balls that hold an item
    nearly: list[np.ndarray] = []  # (sample, item): in the sample's ball as soon as it loses a neighbour
    for start, block in squared_distances(samples, data):
        stop = start + len(block)
        index = np.arange(start, stop)
        hit = block < radius
        inside[start:stop] = hit.sum(axis=1)
        held += hit.sum(axis=0)
        holder += index @ hit
        hit = block < reach[start:stop, k - 1, None]
        seen += hit.sum(axis=0)
        seer += index @ hit
        near = ~hit & (block < reach[start:stop, k, None])
        nearly.append(np.argwhere(near) + [start, 0])
    pairs = np.concatenate(nearly)
    alone = held == 1  # then ``holder`` is the one sample's place
    lost_coverage = np.bincount(holder[alone], minlength=count)
    lost_recall = _lost_recall(seen, seer, pairs, neighbours[:, :k])
    values = {
        "precision": float((inside > 0).mean()),
        "recall": float((seen > 0).mean()),
        "density": float(inside.mean() / k),
        "coverage": float((held > 0).mean()),
    }
    effects = {
        "precision": (inside > 0).astype(np.float64),
        "recall": lost_recall * ((count - 1) / items),
        "density": inside / k,
        "coverage": lost_coverage * ((count - 1) / items),
    }
    return Overlap(values, {name: effect - effect.mean() for name, effect in effects.items()})


def _lost_recall(seen: np.ndarray, seer: np.ndarray, pairs: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Items that no ball would hold without a sample, less those that a ball would newly hold; (M,).

    Without a sample its own ball is gone, and the balls of those whose neighbour it was reach one neighbour further.
    """
    count = len(neighbours)
    sample, item = pairs[:, 0], pairs[:, 1]
    # Held by one ball alone, and by no other even when its owner is gone:
    saved = (neighbours[sample] == seer[item][:, None]).any(axis=1) & (seen[item] == 1)
    alone = seen == 1
    alone[item[saved]] = False
    lost = np.bincount(seer[alone], minlength=count)
    # Held by none, but by some ball when any of that one's neighbours is gone; each (sample, item) counts once:
    new = seen[item] == 0
    keys = np.unique(item[new][:, None] * count + neighbours[sample[new]])
    return lost - np.bincount(keys % count, minlength=count)
