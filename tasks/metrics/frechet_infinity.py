"""Fréchet distance at infinitely many samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from tasks.checkpoint import file_digest
from tasks.moments import Moments, check_statistics, frechet_distance, frechet_influence, reference_moments
from tasks.parts import part_of
from tasks.registry import Spec, column, features, metrics
from tasks.types import Rows, sample_shape

NAME = "quality/frechet_infinity"


@dataclass(frozen=True)
class _Groups:
    parts: tuple[Moments, ...]

    @cached_property
    def whole(self) -> Moments:
        return reduce(Moments.merge, self.parts)

    @cached_property
    def slope(self) -> float:
        """``(1/n) / (mean 1/n_g - 1/n)``: how far the line goes on from the whole, in steps from the groups to it."""
        return 1.0 / (float(np.mean([self.whole.count / m.count for m in self.parts])) - 1.0)


@metrics.register("frechet_infinity")
@dataclass(frozen=True)
class FrechetInfinity:
    """Fréchet distance extrapolated to infinitely many samples, where its bias of O(1/n) ends.

    The distance of n samples is a line in 1/n. With G groups of about n/G samples each, the line through n and n/G
    meets 1/n = 0 at ``(G FD_n - mean FD_{n/G}) / (G - 1)``; the groups' true sizes are used, to which rows belong as if
    drawn.
    It removes the bias of the samples only: a finite reference leaves its own (with N items as much as N samples
    would). Its standard error is larger than the plain distance's, and it can be negative near zero.

    Args:
        features: name of the feature extractor, or its whole spec.
        statistics: .npz file with mu and sigma of the same features of some data; null takes the model's own data.
        groups: G; each group needs more rows than there are features.

    Reference: Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score", section 4, by a line through
        fifteen sizes; two sizes with disjoint groups make it a sum that merges.
    """

    features: str | dict[str, Any] = "classifier"
    groups: int = 2
    statistics: str | None = None

    better = {NAME: "lower"}

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError(f"metric.groups must be at least 2, got {self.groups}.")

    @property
    def compares_with_data(self) -> bool:
        """Whether the model's own data are needed."""
        return not self.statistics

    @property
    def revision(self) -> str:
        """Of what the file says; of the code where there is none."""
        return file_digest(Path(self.statistics).expanduser()) if self.statistics else "1"

    def needs(self) -> tuple[Spec, ...]:
        """The feature column."""
        return (features.complete(self.features),)

    def check(self, model: Any, num_samples: int) -> None:
        """More rows than features in every group: below, the distance is no line in 1/n."""
        dim = features.build(self.features).dim(sample_shape(model))
        check_statistics(self.statistics, dim)
        if num_samples // self.groups <= dim:
            raise ValueError(
                f"frechet_infinity is rank-deficient: {num_samples // self.groups} rows in each of {self.groups} "
                f"groups for {dim} features. Raise num_samples above {self.groups * (dim + 1)} or use kid."
            )

    def reference(self, model: Any, score: Callable[[Spec, Any, Any], np.ndarray]) -> dict[str, np.ndarray]:
        """Mean and covariance of the reference data's features."""
        return reference_moments(self.features, model, score, self.statistics)

    def summarize(self, rows: Rows) -> _Groups:
        """Moments of these rows, by group."""
        x, group = rows[column(self.features)], part_of(rows["position"], self.groups)
        return _Groups(tuple(Moments.of(x[group == g]) for g in range(self.groups)))

    def merge(self, a: _Groups, b: _Groups) -> _Groups:
        """Group by group."""
        return _Groups(tuple(one.merge(other) for one, other in zip(a.parts, b.parts, strict=True)))

    def compute(self, summary: _Groups, reference: Any) -> dict[str, float]:
        """The extrapolated distance."""
        given = reference["mean"], reference["covariance"]
        whole = frechet_distance(summary.whole.mean, summary.whole.covariance, *given)
        parts = [frechet_distance(m.mean, m.covariance, *given) for m in summary.parts]
        slope = summary.slope
        return {NAME: whole - slope * (float(np.mean(parts)) - whole)}

    def influence(self, summary: _Groups, reference: Any, rows: Rows) -> dict[str, np.ndarray]:
        """First-order effect of each row, through the whole and through its group."""
        x, group = rows[column(self.features)], part_of(rows["position"], self.groups)
        given = reference["mean"], reference["covariance"]
        effect = (1.0 + summary.slope) * frechet_influence(x, summary.whole, *given)
        for g, moments in enumerate(summary.parts):
            own = group == g
            share = summary.slope * summary.whole.count / (self.groups * moments.count)
            effect[own] -= share * frechet_influence(x[own], moments, *given)
        return {NAME: effect}
