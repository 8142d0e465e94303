"""Mean and scatter of features as a mergeable float64 summary, and the Fréchet distance between two of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) = sum of (x - mean)(x - mean)^T, float64.

    Raw sums of squares lose every digit when the mean is large; Chan's merge does not, and is associative.

    Reference: Chan, Golub and LeVeque 1979.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of (B, D) features."""
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D)."""
        return self.scatter / (self.count - 1)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)`` by two symmetric eigensolves in float64.

    Reference: Dowson and Landau 1982; Heusel et al. 2017. A matrix square root of the non-symmetric product AB, the
    usual way, returns complex numbers on rank-deficient input.
    """
    root = _root(cov_a)
    values = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.clip(values, 0.0, None)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def frechet_influence(
    features: np.ndarray, mean: np.ndarray, cov: np.ndarray, mean_ref: np.ndarray, cov_ref: np.ndarray
) -> np.ndarray:
    """First-order effect of each row on the Fréchet distance of its set, (B,), with mean zero over the set.

    With ``A = R (R S R)^-1/2 R`` and R the root of the reference covariance, the gradient in S is I - A, so row x
    contributes ``2 (m - m_ref)(x - m) + (x - m)^T (I - A) (x - m) - tr((I - A) S)``.
    """
    root = _root(cov_ref)
    values, vectors = np.linalg.eigh(root @ cov @ root)
    inverse = np.where(values > values.max() * 1e-12, 1.0 / np.sqrt(np.clip(values, 1e-300, None)), 0.0)
    gradient = np.eye(len(mean)) - root @ ((vectors * inverse) @ vectors.T) @ root
    centred = np.asarray(features, dtype=np.float64) - mean
    quadratic = np.einsum("bi,ij,bj->b", centred, gradient, centred, optimize=True)
    return 2.0 * centred @ (mean - mean_ref) + quadratic - np.trace(gradient @ cov)
