"""Linear measurements ``y = A x_0 + sigma_y e`` of clean states, and what an inverse problem asks of them.

A is one of three kinds, so that images of any size need no matrix of all their pixels: a selection of places, a product
of one small matrix per axis (blur, averages, every second pixel), or a given matrix. Each knows its adjoint, and the
eigenvectors of ``A^T A``, in which linear equations with it are solved. Everything is computed in float64.

The likelihood here is that of a clean state, and is also asked of noisy ones by methods whose intermediate laws are
tilted by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tasks.registry import unknown

KINDS = ("inpaint", "blur", "pool", "subsample", "all", "matrix")
BLOCKS = ("lower", "centre")


class Operator(Protocol):
    """A linear map of states (B, *shape) to measurements (B, M)."""

    size: int
    trace: float

    def __call__(self, x: Tensor) -> Tensor: ...
    def adjoint(self, y: Tensor) -> Tensor: ...
    def spectral(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor: ...


class Selection:
    """Keeps some places of a state and loses the others.

    Args:
        keep: which places, (*shape) bool.
    """

    def __init__(self, keep: Tensor) -> None:
        self._keep = keep
        self._places = keep.flatten().nonzero()[:, 0]
        self.size, self.trace = len(self._places), float(len(self._places))

    def __call__(self, x: Tensor) -> Tensor:
        """A x, (B, M)."""
        return x.double().flatten(1)[:, self._places]

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *shape)."""
        x = torch.zeros(len(y), self._keep.numel(), dtype=torch.float64, device=y.device)
        x[:, self._places] = y.double()
        return x.view(-1, *self._keep.shape)

    def spectral(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``f(A^T A) x`` for a function of the eigenvalues, (B, *shape)."""
        return function(self._keep.double()) * x.double()


class Separable:
    """One matrix along the rows of an image and one along its columns, the same for every channel.

    Args:
        left: (M_1, H); acts on columns of pixels.
        right: (M_2, W); acts on rows of pixels.
        shape: (C, H, W), or (W,) when H = 1.
    """

    def __init__(self, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> None:
        self._left, self._right, self._shape = left.double(), right.double(), shape
        self._grid = (math.prod(shape) // (left.shape[1] * right.shape[1]), left.shape[1], right.shape[1])
        self._measured = (self._grid[0], left.shape[0], right.shape[0])
        self.size = math.prod(self._measured)
        self.trace = float(self._left.square().sum() * self._right.square().sum()) * self._grid[0]

    def __call__(self, x: Tensor) -> Tensor:
        """A x, (B, M)."""
        return (self._left @ x.double().view(-1, *self._grid) @ self._right.T).flatten(1)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *shape)."""
        return (self._left.T @ y.double().view(-1, *self._measured) @ self._right).reshape(-1, *self._shape)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of A^T A (H, W), and its eigenvectors along either axis."""
        rows, u = torch.linalg.eigh(self._left.T @ self._left)
        columns, v = torch.linalg.eigh(self._right.T @ self._right)
        return rows.clamp(min=0)[:, None] * columns.clamp(min=0), u, v

    def spectral(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``f(A^T A) x`` for a function of the eigenvalues, (B, *shape)."""
        values, u, v = self._eigen
        inner = function(values) * (u.T @ x.double().view(-1, *self._grid) @ v)
        return (u @ inner @ v.T).reshape(-1, *self._shape)


class Matrix:
    """Any matrix.

    Args:
        matrix: (M, D) with D the number of elements of a state.
        shape: shape of a state.
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        self._matrix, self._shape = matrix.double(), shape
        self.size, self.trace = len(matrix), float(self._matrix.square().sum())

    def __call__(self, x: Tensor) -> Tensor:
        """A x, (B, M)."""
        return x.double().flatten(1) @ self._matrix.T

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *shape)."""
        return (y.double() @ self._matrix).view(-1, *self._shape)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._matrix.T @ self._matrix)
        return values.clamp(min=0), vectors

    def spectral(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``f(A^T A) x`` for a function of the eigenvalues, (B, *shape)."""
        values, vectors = self._eigen
        return ((x.double().flatten(1) @ vectors) * function(values) @ vectors.T).view(-1, *self._shape)


def gaussian_blur(length: int, width: float) -> Tensor:
    """Blur along one axis by a Gaussian with standard deviation ``width`` pixels, (length, length); rows sum to 1."""
    place = torch.arange(length, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((place[:, None] - place) / width) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def averages(length: int, factor: int) -> Tensor:
    """Means of ``factor`` neighbours along one axis, (length / factor, length)."""
    return torch.eye(length // factor, dtype=torch.float64).repeat_interleave(factor, dim=1) / factor


def every(length: int, factor: int) -> Tensor:
    """Every ``factor``-th element along one axis, (ceil(length / factor), length)."""
    return torch.eye(length, dtype=torch.float64)[::factor]


def operator(
    kind: str,
    shape: tuple[int, ...],
    *,
    block: str = "lower",
    width: float = 1.0,
    factor: int = 2,
    matrix: Any = None,
    device: Any = "cpu",
) -> Operator:
    """The measurement operator of a name for states of a shape, (C, H, W) or (W,).

    Args:
        kind: inpaint (a block is missing), blur, pool (means of neighbours), subsample (every factor-th), all, matrix.
        shape: shape of a state.
        block: what inpaint loses: the lower half, or the centre (half of either side).
        width: standard deviation of the blur in pixels.
        factor: neighbours that pool averages, or the stride of subsample, along either axis.
        matrix: rows of the given matrix.
        device: where its tensors lie.

    Raises:
        ValueError: an operator that states of this shape do not have.
    """
    grid = (1, *shape) if len(shape) == 1 else tuple(shape[-2:])
    if kind == "matrix":
        return Matrix(_matrix(matrix, math.prod(shape)).to(device), shape)
    if kind == "all":
        return Selection(torch.ones(shape, dtype=torch.bool, device=device))
    if kind == "inpaint":
        keep = torch.ones((math.prod(shape) // math.prod(grid), *grid), dtype=torch.bool, device=device)
        height, width_px = grid
        if block == "lower":
            keep[..., (height // 2 if height > 1 else 0) :, (0 if height > 1 else width_px // 2) :] = False
        elif block == "centre":
            rows = slice(height // 4, height - height // 4) if height > 1 else slice(None)
            keep[..., rows, width_px // 4 : width_px - width_px // 4] = False
        else:
            raise unknown("block", block, list(BLOCKS), "Allowed")
        return Selection(keep.view(shape))
    if kind == "blur":
        if not width > 0:
            raise ValueError(f"reward.width must be positive, got {width}. It is the blur's standard deviation.")
        along = [gaussian_blur(length, width) for length in grid]
    elif kind in ("pool", "subsample"):
        if factor < 1 or (kind == "pool" and any(length % factor for length in grid if length > 1)):
            raise ValueError(
                f"reward.factor must be at least 1 and, for pool, divide the sides {grid}; got {factor}. Use 2."
            )
        make = averages if kind == "pool" else every
        along = [make(length, factor) if length > 1 else torch.ones(1, 1) for length in grid]
    else:
        raise unknown("operator", kind, list(KINDS), "Allowed")
    return Separable(along[0].to(device), along[1].to(device), shape)


def _matrix(rows: Any, dim: int) -> Tensor:
    try:
        found = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    except (TypeError, ValueError):
        found = np.empty((0, 0))
    if found.ndim != 2 or not len(found) or found.shape[1] != dim or not np.isfinite(found).all():
        raise ValueError(f"reward.matrix must be rows of {dim} numbers each, one row a measurement, got {rows!r}.")
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Measured:
    """The measurements of some rows: ``r(x) = log N(y; A x, sigma_y^2 I)`` and what follows from it.

    Called as a scorer it gives r.

    Attributes:
        operator: A.
        y: measurements, (B, M) float64.
        sigma_y: standard deviation of their noise.
    """

    operator: Operator
    y: Tensor
    sigma_y: float

    def residual(self, x: Tensor) -> Tensor:
        """y - A x, (B, M) float64."""
        return self.y - self.operator(x)

    def __call__(self, samples: Tensor, cond: Tensor | None = None) -> Tensor:
        """r(x) in nats, (B,) float64."""
        squares = self.residual(samples).square().sum(1) / self.sigma_y**2
        return -0.5 * squares - 0.5 * self.operator.size * math.log(2 * math.pi * self.sigma_y**2)

    @property
    def laplacian(self) -> float:
        """The trace of r's second derivative, ``-tr(A^T A) / sigma_y^2``."""
        return -self.operator.trace / self.sigma_y**2

    def relax(self, mean: Tensor, kick: Tensor, time: float) -> Tensor:
        """Follow ``dx = grad r(x) du`` for ``time`` from x = mean, while the noise ``kick`` enters evenly; (B, *shape).

        Along an eigenvector of A^T A with eigenvalue l this is an Ornstein-Uhlenbeck process of rate
        ``a = time l / sigma_y^2``: what was there shrinks by exp(-a), the noise by ``sqrt((1 - exp(-2a)) / 2a)``. So it
        is stable however small sigma_y is.
        """
        a = time / self.sigma_y**2

        def shrunk(values: Tensor) -> Tensor:
            return torch.exp(-a * values)

        def gathered(values: Tensor) -> Tensor:  # (1 - exp(-a l)) / l, which is a at l = 0
            return torch.where(values > 0, -torch.expm1(-a * values) / values.clamp(min=1e-300), a)

        def admitted(values: Tensor) -> Tensor:
            rate = 2 * a * values
            return torch.where(rate > 0, -torch.expm1(-rate) / rate.clamp(min=1e-300), 1.0).sqrt()

        pull = self.operator.spectral(self.operator.adjoint(self.y), gathered)
        moved = self.operator.spectral(mean, shrunk) + pull + self.operator.spectral(kick, admitted)
        return moved.to(mean.dtype)
