"""Axes that stand for a place in a trajectory (``order.2``), and free time nodes between ratios and times.

A space gives node i as a fraction of the node before. What is crossed or replaced are the nodes themselves, as
fractions of the first time, so that a child has nodes that its parents had, wherever these stood among the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.space import Axis

RATIO = "ratio"
SKIP = "skip"


def split(name: str) -> tuple[str, int | None]:
    """The decision and the step of an axis; no step for an axis that belongs to none."""
    head, _, place = name.rpartition(".")
    return (head, int(place)) if head and place.isdigit() else (name, None)


def nodes_of(params: Mapping[str, Any]) -> list[float]:
    """The free nodes of a point as fractions of the first time, decreasing."""
    nodes: list[float] = []
    last = 1.0
    while (name := f"{RATIO}.{len(nodes) + 1}") in params:
        last *= params[name]
        nodes.append(last)
    return nodes


def ratios_of(nodes: Sequence[float], axes: Mapping[str, Axis]) -> dict[str, float]:
    """Nodes, in any order, as the parameters nearest to them that the axes allow."""
    found: dict[str, float] = {}
    last = 1.0
    for i, node in enumerate(sorted(nodes, reverse=True), 1):
        axis = axes[f"{RATIO}.{i}"]
        found[axis.name] = axis.nearest(node / last)
        last *= found[axis.name]
    return found


def is_apart(a: float, b: float, axes: Mapping[str, Axis]) -> bool:
    """Whether two nodes can both be nodes of one grid."""
    return min(a, b) <= min(axes[f"{RATIO}.1"].high, 0.999) * max(a, b) * (1 + 1e-9)  # 0.999: as a schedule's own
