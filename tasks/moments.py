"""Mean and scatter of features as a mergeable float64 summary, and the Fréchet distance between two of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tasks.once import Once
from tasks.registry import Spec, column, features

BLOCK = 4096  # rows that are held in float64 at a time


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) = sum of (x - mean)(x - mean)^T, float64.

    Raw sums of squares lose every digit when the mean is large; Chan's merge does not, and is associative. A scatter is
    symmetric, so only its lower triangle is kept (above the diagonal are zeros): half the multiplications, and merging
    is one pass over memory.

    Reference: Chan, Golub and LeVeque 1979.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray
    once: Once = field(default_factory=Once, compare=False, repr=False)

    @classmethod
    def of(cls, rows: np.ndarray) -> Moments:
        """Moments of (B, D) features of any float type; B may be 0. Copies ``BLOCK`` rows at a time, never all."""
        from scipy.linalg.blas import dsyrk

        count, dim = rows.shape
        mean, scatter = np.zeros(dim), np.zeros((dim, dim), order="F")
        for start in range(0, count, BLOCK):
            part = np.array(rows[start : start + BLOCK], dtype=np.float64, order="C")
            centre = part.mean(axis=0)
            part -= centre
            scatter = dsyrk(1.0, part.T, beta=1.0, c=scatter, lower=1, overwrite_c=1)
            share = len(part) / (start + len(part))
            scatter = _with_between(scatter, centre - mean, share * start)
            mean += (centre - mean) * share
        return cls(count, mean, scatter)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        if not self.count or not other.count:
            return self if self.count else other
        share = other.count / (self.count + other.count)
        delta = other.mean - self.mean
        scatter = _with_between(self.scatter + other.scatter, delta, share * self.count)
        return Moments(self.count + other.count, self.mean + delta * share, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D)."""
        half = self.scatter / (self.count - 1)
        return half + np.tril(half, -1).T


def _with_between(scatter: np.ndarray, delta: np.ndarray, weight: float) -> np.ndarray:
    """A scatter with Chan's term, ``weight delta delta^T``, added to its lower triangle, in place."""
    from scipy.linalg.blas import dsyr

    return dsyr(weight, delta, lower=1, a=scatter, overwrite_a=1)


def _factor(matrix: np.ndarray) -> np.ndarray:
    """Some F with F F^T = matrix: Cholesky's, or the symmetric root where the matrix is singular."""
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(np.clip(values, 0.0, None))


def reference_moments(
    spec: Spec | str, model: Any, score: Callable[[Spec, Any, Any], np.ndarray], statistics: str | None = None
) -> dict[str, Any]:
    """Mean and covariance of some features of a model's data: those in a file, or exact ones where it knows them."""
    if statistics:
        return read_statistics(statistics)
    if column(spec) == "identity" and hasattr(model, "moments"):
        mean, covariance = model.moments()
        return {"mean": mean, "covariance": covariance}
    found = Moments.of(score(features.complete(spec), *model.reference()))
    return {"mean": found.mean, "covariance": found.covariance}


def read_statistics(path: str) -> dict[str, np.ndarray]:
    """Mean (D,) and covariance (D, D), float64, from an .npz file with mu and sigma, as ADM's and pytorch-fid's.

    Raises:
        ValueError: no such file, or other contents.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as found:
            mean, covariance = (np.asarray(found[name], dtype=np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"metric.statistics {path!r} is no .npz file with mu and sigma: {error}.") from None
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2 or not np.isfinite(covariance).all():
        raise ValueError(
            f"metric.statistics {path!r} must hold finite mu (D,) and sigma (D, D), got shapes {mean.shape} and "
            f"{covariance.shape}."
        )
    return {"mean": mean, "covariance": covariance}


def check_statistics(path: str | None, dim: int) -> None:
    """Refuse a file whose features are others.

    Raises:
        ValueError: it cannot be read, or has another number of features.
    """
    if path and (count := len(read_statistics(path)["mean"])) != dim:
        raise ValueError(
            f"metric.statistics {path!r} is of {count} features, but metric.features gives {dim}. Name the features "
            "that the file was made with."
        )


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)`` by one symmetric eigensolve in float64.

    With any ``A = F F^T`` the eigenvalues of ``F^T B F`` are those of ``A^1/2 B A^1/2``, so a Cholesky factor serves
    as well as the root, at a tenth of its cost.

    Reference: Dowson and Landau 1982; Heusel et al. 2017. A matrix square root of the non-symmetric product AB, the
    usual way, returns complex numbers on rank-deficient input.
    """
    factor = _factor(cov_a)
    values = np.linalg.eigvalsh(factor.T @ cov_b @ factor)
    cross = np.sqrt(np.clip(values, 0.0, None)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def frechet_gradient(cov: np.ndarray, cov_ref: np.ndarray) -> np.ndarray:
    """Gradient of the Fréchet distance in the covariance of its set, (D, D): ``I - F (F^T S F)^-1/2 F^T``.

    F F^T is the reference covariance and S the set's own; directions in which the two have nothing in common are left
    out of the inverse.
    """
    factor = _factor(cov_ref)
    values, vectors = np.linalg.eigh(factor.T @ cov @ factor)
    inverse = np.where(values > values.max() * 1e-12, 1.0 / np.sqrt(np.clip(values, 1e-300, None)), 0.0)
    turned = factor @ (vectors * np.sqrt(inverse))
    return np.eye(len(cov)) - turned @ turned.T


def frechet_influence(x: np.ndarray, own: Moments, mean_ref: np.ndarray, cov_ref: np.ndarray) -> np.ndarray:
    """First-order effect of each row on the Fréchet distance of its set, (B,), with mean zero over the set.

    With G the gradient, row x contributes ``2 (m - m_ref)(x - m) + (x - m)^T G (x - m) - tr(G S)``. G is worked out
    once for a set and a reference.

    Args:
        x: features of rows of the set, (B, D).
        own: moments of the whole set.
        mean_ref, cov_ref: of the reference.
    """
    gradient, level = own.once(cov_ref, lambda: _with_trace(own.covariance, cov_ref))
    centred = np.asarray(x, dtype=np.float64) - own.mean
    quadratic = np.einsum("bi,bi->b", centred @ gradient, centred)
    return 2.0 * centred @ (own.mean - mean_ref) + quadratic - level


def _with_trace(cov: np.ndarray, cov_ref: np.ndarray) -> tuple[np.ndarray, float]:
    gradient = frechet_gradient(cov, cov_ref)
    return gradient, float(np.einsum("ij,ji->", gradient, cov))
