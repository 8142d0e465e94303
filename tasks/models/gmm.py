"""Gaussian mixtures: the exact posterior mean in any dimension, under every Gaussian process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.mean_reverting import MeanReverting
from tasks.mixtures import PROCESSES, fit_digits
from tasks.processes import GaussianProcess, Time, expand, from_x0
from tasks.registry import models, unknown


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"model.{name} must be numbers in rows of equal length, got {values!r}.") from None


@models.register("gmm")
@dataclass(frozen=True)
class GMM:
    """Gaussian mixture with its exact posterior mean, score and moments.

    ``E[x_0 | x_t] = sum_k r_k(x_t) (m_k + alpha C_k (alpha^2 C_k + sigma^2 I)^-1 (x_t - alpha m_k))`` with the
    responsibilities r_k of N(alpha m_k, alpha^2 C_k + sigma^2 I). Labels pick a component, so guidance is exact too.

    Args:
        dim: dimension D of a random mixture (ignored when means are given or fitted).
        num_components: number of components K of a random mixture.
        seed: seed of a random mixture.
        process: noising process: vp (linear betas), edm, flow, mr (mean-reverting, around the origin).
        weights: component weights, K numbers; equal when left out.
        means: K rows of D numbers.
        covariances: K matrices, or K rows of D variances, or K standard deviations.
        fit: "digits" fits one Gaussian per class to scikit-learn's digits (D = 64, K = 10).
        ridge: variance added to every direction of a fitted covariance.
        labels: whether rows carry a label that picks their component.

    Reference: closed form; see e.g. Karras et al. 2022, appendix B.3 (the ideal denoiser).
    """

    dim: int = 2
    num_components: int = 3
    seed: int = 0
    process: str = "vp"
    weights: tuple[float, ...] | None = None
    means: tuple[tuple[float, ...], ...] | None = None
    covariances: tuple[Any, ...] | None = None
    fit: str | None = None
    ridge: float = 0.01
    labels: bool = False

    kind = "vector"

    def __post_init__(self) -> None:
        if self.process not in PROCESSES:
            raise unknown("process", self.process, sorted(PROCESSES), "Allowed")
        if self.fit not in (None, "digits"):
            raise ValueError(f"model.fit must be null or 'digits', got {self.fit!r}.")
        if self.dim < 1 or self.num_components < 1:
            raise ValueError(f"gmm needs dim >= 1 and num_components >= 1, got {self.dim} and {self.num_components}.")
        _ = self.parameters  # refuses bad means and covariances when planning

    @cached_property
    def parameters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights (K,), means (K, D), covariances (K, D, D), float64."""
        if self.fit == "digits":
            return fit_digits(self.ridge)
        if self.means is None:
            rng = np.random.default_rng(self.seed)
            means = rng.uniform(-1, 1, (self.num_components, self.dim))
            roots = rng.normal(size=(self.num_components, self.dim, self.dim)) * 0.2 / np.sqrt(self.dim)
            covariances = roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(self.dim)
            weights = rng.uniform(0.5, 1.5, self.num_components)
        else:
            means = np.atleast_2d(_array(self.means, "means"))
            count, dim = means.shape
            given = _array(1.0 if self.covariances is None else self.covariances, "covariances")
            if given.ndim == 3:
                covariances = given
            elif given.ndim == 2:
                covariances = np.stack([np.diag(row) for row in given])
            else:
                covariances = np.stack([s**2 * np.eye(dim) for s in np.broadcast_to(given, (count,))])
            weights = np.ones(count)
            if covariances.shape != (count, dim, dim):
                raise ValueError(
                    f"model.covariances must describe {count} components in {dim} dimensions, got shape {given.shape}."
                )
        if self.weights is not None:
            weights = np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (len(means),) or (weights <= 0).any():
            raise ValueError(f"model.weights must be {len(means)} positive numbers, got {self.weights!r}.")
        if np.linalg.eigvalsh(covariances).min() <= 0:
            raise ValueError("model.covariances must be positive definite; add a ridge.")
        return weights / weights.sum(), means, covariances

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.parameters[1].shape[1],)

    @property
    def num_classes(self) -> int:
        """K when rows are labelled, else 0."""
        return len(self.parameters[0]) if self.labels else 0

    @property
    def revision(self) -> str:
        """Nothing beyond the spec."""
        return "exact"

    @property
    def gives(self) -> tuple[str, ...]:
        """The posterior mean; for one component, whose flow is linear, also the flow map and so its end."""
        one = len(self.parameters[0]) == 1
        return ("posterior_mean", "flow_end", "flow_map") if one else ("posterior_mean",)

    @property
    def noising(self) -> GaussianProcess | MeanReverting:
        """The process object."""
        return PROCESSES[self.process]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D) of the mixture, closed form."""
        weights, means, covariances = self.parameters
        mean = weights @ means
        centred = means - mean
        return mean, np.einsum("k,kij->ij", weights, covariances) + np.einsum("k,ki,kj->ij", weights, centred, centred)

    def reference(self, count: int = 10000) -> tuple[np.ndarray, np.ndarray]:
        """Exact draws with a fixed seed: samples (count, D) float32 and their components (count,)."""
        weights, means, covariances = self.parameters
        rng = np.random.default_rng(20230)
        component = rng.choice(len(weights), size=count, p=weights)
        roots = np.linalg.cholesky(covariances)
        z = rng.normal(size=(count, means.shape[1]))
        return (means[component] + np.einsum("nij,nj->ni", roots[component], z)).astype(np.float32), component

    def load(self, device: str) -> MixtureDenoiser:
        """The denoiser on a device."""
        kind = GaussianDenoiser if len(self.parameters[0]) == 1 else MixtureDenoiser
        return kind(self, torch.device(device))


class MixtureDenoiser:
    """The exact denoiser of a mixture; computes in float64 and answers in the dtype of the state."""

    def __init__(self, spec: GMM, device: torch.device) -> None:
        weights, means, covariances = spec.parameters
        values, vectors = np.linalg.eigh(covariances)
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, spec.num_classes
        self._log_w = torch.from_numpy(np.log(weights)).to(device)
        self._means = torch.from_numpy(means).to(device)
        self._values = torch.from_numpy(values).to(device)  # (K, D)
        self._vectors = torch.from_numpy(vectors).to(device)  # (K, D, D), columns are eigenvectors

    def _posterior(self, x: Tensor, t: Time, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log of the joint density of x and each component (B, K), and component posterior means (B, K, D)."""
        wide = x.double()[:, None, :]  # (B, 1, D)
        alpha, sigma = expand(self.process.alpha(t), wide), expand(self.process.sigma(t), wide)
        variance = alpha**2 * self._values + sigma**2  # (K, D), or (B, K, D) for a time a row
        centred = wide - alpha * self._means  # (B, K, D)
        rotated = torch.einsum("bki,kij->bkj", centred, self._vectors)
        logits = self._log_w - 0.5 * (torch.log(variance).sum(-1) + (rotated**2 / variance).sum(-1))
        if cond is not None and self.num_classes:
            chosen = torch.nn.functional.one_hot(cond, self.num_classes + 1)[:, :-1].bool()
            free = (cond == self.num_classes)[:, None]
            logits = torch.where(chosen | free, logits, torch.full_like(logits, -torch.inf))
        shrunk = rotated * (alpha * self._values / variance)
        return logits, self._means + torch.einsum("bkj,kij->bki", shrunk, self._vectors)

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t = x], (B, D)."""
        logits, means = self._posterior(x, t, cond)
        return torch.einsum("bk,bkd->bd", torch.softmax(logits, dim=-1), means).to(x.dtype)

    def log_density(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """log p_t(x), (B,) float64."""
        logits, _ = self._posterior(x, t, cond)
        return torch.logsumexp(logits, dim=-1) - 0.5 * x.shape[1] * float(np.log(2 * np.pi))

    def score(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """grad log p_t(x), (B, D)."""
        return from_x0(
            "score", x, self.denoise(x, t, cond), expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        )

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The state itself."""
        return x0


class GaussianDenoiser(MixtureDenoiser):
    """The exact denoiser of one component, whose probability-flow ODE has a closed solution too."""

    def flow_map(self, x: Tensor, t: Time, s: Time, cond: Tensor | None = None) -> Tensor:
        """Where the probability-flow ODE carries x from time t to time s, (B, D).

        ``x_s = alpha_s m + sum_k sqrt((alpha_s^2 v_k + sigma_s^2) / (alpha_t^2 v_k + sigma_t^2)) u_k u_k^T (x - alpha_t
        m)`` with the eigenpairs (v_k, u_k) of the covariance: every direction keeps its quantile.
        """
        wide, mean, values, vectors = x.double(), self._means[0], self._values[0], self._vectors[0]
        alpha_t, sigma_t = expand(self.process.alpha(t), wide), expand(self.process.sigma(t), wide)
        alpha_s, sigma_s = expand(self.process.alpha(s), wide), expand(self.process.sigma(s), wide)
        stretch = ((alpha_s**2 * values + sigma_s**2) / (alpha_t**2 * values + sigma_t**2)) ** 0.5
        rotated = ((wide - alpha_t * mean) @ vectors) * stretch
        return (alpha_s * mean + rotated @ vectors.T).to(x.dtype)
