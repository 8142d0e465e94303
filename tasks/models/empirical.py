"""A finite set of points: the ideal denoiser of a training set, Gaussian or PFGM++."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.mean_reverting import MeanReverting
from tasks.mixtures import PROCESSES
from tasks.pfgm import PFGMpp
from tasks.processes import GaussianProcess, Time, expand
from tasks.registry import models, unknown

ALLOWED = sorted([*PROCESSES, "pfgmpp"])
TINY = 1e-100  # stands in for sigma = 0, where the nearest point has all the weight


@models.register("empirical")
@dataclass(frozen=True)
class Empirical:
    """Finite point set with its exact posterior mean, under Gaussian noise and under that of PFGM++.

    ``E[y | x] = sum_j w_j y_j`` over the points, with ``w_j ~ exp(-|x - alpha y_j|^2 / (2 sigma^2))`` for Gaussian
    noise and ``w_j ~ (|x - y_j|^2 + r^2)^-((N + D)/2)`` for PFGM++ with r = sigma sqrt(D). A sampler that solves the
    ODE well returns the points themselves.

    Args:
        process: noising process: edm, flow, mr, pfgmpp, vp.
        aug_dim: number of augmented dimensions D of pfgmpp.
        num_points: only the first so many points; null takes all.
        points: rows of N numbers; null takes scikit-learn's digits (N = 64).
        classes: class of every given point, from 0; null makes each a class of its own.
        labels: whether rows carry a label that restricts the points to those of its class.

    Reference: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 57; Xu et
        al. 2023, "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models", section 3.
    """

    process: str = "edm"
    aug_dim: float = 2048.0
    num_points: int | None = None
    points: tuple[tuple[float, ...], ...] | None = None
    classes: tuple[int, ...] | None = None
    labels: bool = False

    kind = "vector"

    def __post_init__(self) -> None:
        if self.process not in ALLOWED:
            raise unknown("process", self.process, ALLOWED, "Allowed")
        _ = self.noising  # refuses a bad aug_dim
        if self.points is not None and (not self.points or not self.points[0] or len(set(map(len, self.points))) > 1):
            raise ValueError(f"model.points must be rows of equal length, got {self.points!r}.")
        if self.classes is not None and self.points is None:
            raise ValueError("model.classes goes with model.points; the digits have their own.")
        if self.classes is not None and self.points is not None and len(self.classes) != len(self.points):
            raise ValueError(
                f"model.classes must name a class for each of the {len(self.points)} points, got {len(self.classes)}."
            )
        points, classes = self._all
        if self.num_points is not None and not 1 <= self.num_points <= len(points):
            raise ValueError(f"model.num_points must be 1 to {len(points)}, got {self.num_points}.")
        found = sorted(set(self.data[1].tolist()))
        if self.labels and found != list(range(self.num_classes)):
            raise ValueError(
                f"with model.labels every class from 0 to {max(self.num_classes - 1, 0)} needs a point, but these are "
                f"of the classes {found}. Take more points or number the classes without gaps."
            )

    @property
    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        from tasks.data import digits

        if self.points is None:
            return digits.images().reshape(-1, 64).astype(np.float64), digits.labels()
        given = np.asarray(self.points, dtype=np.float64)
        return given, np.asarray(range(len(given)) if self.classes is None else self.classes, dtype=np.int64)

    @cached_property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """The points, (M, N) float64, and their classes, (M,) int64."""
        points, classes = self._all
        return points[: self.num_points], classes[: self.num_points]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N,)."""
        return (self.data[0].shape[1],)

    @property
    def num_classes(self) -> int:
        """Number of classes when rows are labelled, else 0."""
        return int(self._all[1].max()) + 1 if self.labels else 0

    @property
    def revision(self) -> str:
        """Hash of the points and classes."""
        points, classes = self.data
        return hashlib.sha256(points.tobytes() + classes.tobytes()).hexdigest()[:16]

    @cached_property
    def noising(self) -> GaussianProcess | MeanReverting:
        """The process object."""
        return PFGMpp(aug_dim=self.aug_dim) if self.process == "pfgmpp" else PROCESSES[self.process]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (N,) and covariance (N, N) of the points."""
        points = self.data[0]
        return points.mean(0), np.atleast_2d(np.cov(points.T, bias=True))

    def reference(self, count: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The points, (M, N) float32, and their classes."""
        points, classes = self.data
        return points.astype(np.float32), classes

    def load(self, device: str) -> EmpiricalDenoiser:
        """The denoiser on a device."""
        return EmpiricalDenoiser(self, torch.device(device))


class EmpiricalDenoiser:
    """The ideal denoiser of a point set; computes in float64 and answers in the dtype of the state."""

    def __init__(self, spec: Empirical, device: torch.device) -> None:
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, spec.num_classes
        points, classes = spec.data
        self._points = torch.from_numpy(points).to(device)  # (M, N)
        self._classes = torch.from_numpy(classes).to(device)

    def weights(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """Posterior probability of every point, (B, M) float64."""
        wide = x.double()
        alpha = expand(self.process.alpha(t), wide)
        sigma = expand(self.process.sigma(t), wide)
        sigma = sigma.clamp(min=TINY) if isinstance(sigma, Tensor) else max(sigma, TINY)
        # |x - alpha y|^2 from its parts: all pairs of differences would be M times the state.
        squares = wide.square().sum(1, keepdim=True) + alpha**2 * self._points.square().sum(1)
        distance = (squares - 2 * alpha * (wide @ self._points.T)).clamp(min=0.0)
        if isinstance(self.process, PFGMpp):
            dim = self.process.aug_dim
            # The power of r^2 that all points share is left out, so that a huge D costs no digits.
            logits = -0.5 * (len(self._points[0]) + dim) * torch.log1p(distance / (sigma**2 * dim))
        else:
            logits = -(distance - distance.min(1, keepdim=True).values) / (2 * sigma**2)
        if cond is not None and self.num_classes:
            fits = (cond[:, None] == self._classes) | (cond == self.num_classes)[:, None]
            logits = torch.where(fits, logits, torch.full_like(logits, -torch.inf))
        return torch.softmax(logits, dim=-1)

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[y | x_t = x], (B, N)."""
        return (self.weights(x, t, cond) @ self._points).to(x.dtype)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The state itself."""
        return x0
