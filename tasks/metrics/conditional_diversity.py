"""Diversity within a label or a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows

NAME = "quality/conditional_diversity"


@dataclass(frozen=True)
class _Group:
    count: int
    mean: np.ndarray  # (D,)
    scatter: float  # sum of squared distances to the mean

    def merge(self, other: _Group) -> _Group:
        count = self.count + other.count
        delta = other.mean - self.mean
        between = float(delta @ delta) * self.count * other.count / count
        return _Group(count, self.mean + delta * (other.count / count), self.scatter + other.scatter + between)

    @property
    def pairs(self) -> float:
        """Mean squared distance of two rows."""
        return 2.0 * self.scatter / (self.count - 1)


Groups = Mapping[Any, _Group]


@metrics.register("conditional_diversity")
@dataclass(frozen=True)
class ConditionalDiversity:
    """Mean squared distance between two samples of one label or prompt, averaged over labels or prompts.

    Guidance and steering lower it where ``diversity``, which counts differences between labels too, hardly moves.
    Groups of one row say nothing and are left out.

    Args:
        features: name of the feature extractor, or its whole spec.
        by: column of the rows whose values make the groups: label, or one that holds prompts.
        relative: divide by the same of the reference data's labels, so that 1 is as diverse as the data; only with
            by=label.

    Reference: Ojha et al. 2021, "Few-shot Image Generation via Cross-domain Correspondence" (Intra-LPIPS), in other
        features.
    """

    features: str | dict[str, Any] = "classifier"
    by: str = "label"
    relative: bool = True

    better = {NAME: "higher"}

    def __post_init__(self) -> None:
        if self.relative and self.by != "label":
            raise ValueError(
                f"metric.relative divides by the data's diversity within a label, but metric.by is {self.by!r}. Set "
                "metric.relative to false."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of the rows themselves."""
        return (self.by,)

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """Two rows for every label."""
        groups = model.num_classes if self.by == "label" else 1
        if num_samples < 2 * groups:
            raise ValueError(
                f"conditional_diversity compares samples of one label: num_samples must be {2 * groups} at least for "
                f"{groups} labels, got {num_samples}."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Labels, where it groups by them."""
        if self.by == "label" and not recipe.has_labels:
            raise ValueError(
                "metric conditional_diversity groups by label, but this study has none. Use metric diversity."
            )

    @property
    def compares_with_data(self) -> bool:
        """Whether it is told relative to that of the data."""
        return self.relative

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray] | None:
        """The data's own."""
        if not self.relative:
            return None
        samples, labels = model.reference()
        groups = _grouped(score(self.needs()[0], samples, labels), np.asarray(labels))
        return {"pairs": np.array(_mean_pairs(groups))}

    def summarize(self, rows: Rows) -> Groups:
        """Count, mean and scatter of every group."""
        return _grouped(rows[column(self.features)], rows[self.by])

    def merge(self, a: Groups, b: Groups) -> Groups:
        """Group by group."""
        both = {key: a[key].merge(b[key]) for key in a.keys() & b.keys()}
        return {**a, **b, **both}

    def compute(self, summary: Groups, reference: Any) -> dict[str, float]:
        """The mean over the groups."""
        return {NAME: _mean_pairs(summary) / _unit(reference)}

    def influence(self, summary: Groups, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """``n / (G n_g) 2 (|x - m_g|^2 - S_g / n_g)`` of a row in group g; rows alone in theirs have none.

        Labels and prompts are taken as given. Where standard errors are to hold for new ones (``rows["group"]``, the
        same within each), what a group's own value differs from the mean is added.
        """
        used = {key: group for key, group in summary.items() if group.count > 1}
        total, mean = sum(group.count for group in used.values()), _mean_pairs(summary)
        effect = np.full(len(rows[self.by]), np.nan)
        x = np.asarray(rows[column(self.features)], dtype=np.float64)
        for key in set(rows[self.by].tolist()) & used.keys():
            own, group = rows[self.by] == key, used[key]
            distance = 2.0 * (np.square(x[own] - group.mean).sum(axis=1) - group.scatter / group.count)
            if "group" in rows and len(set(rows["group"][own].tolist())) == 1:
                distance += group.pairs - mean
            effect[own] = distance * total / (len(used) * group.count)
        return {NAME: effect / _unit(reference)}


def _grouped(x: np.ndarray, keys: np.ndarray) -> Groups:
    if keys.dtype.kind == "f" and np.isnan(keys).any():
        raise ValueError(
            "the rows lack the column that conditional_diversity groups by. Set metric.by to one they have."
        )
    found = {}
    for key in sorted(set(keys.tolist())):
        own = np.asarray(x[keys == key], dtype=np.float64)
        mean = own.mean(axis=0)
        found[key] = _Group(len(own), mean, float(np.square(own - mean).sum()))
    return found


def _mean_pairs(groups: Groups) -> float:
    """Mean over the groups of two rows or more, in the order of their keys."""
    found = [groups[key].pairs for key in sorted(groups) if groups[key].count > 1]
    if not found:
        raise ValueError(f"conditional_diversity found {len(groups)} groups of one row each. Raise num_samples.")
    return float(np.mean(found))


def _unit(reference: Any) -> float:
    return 1.0 if reference is None else float(reference["pairs"])
