"""Restoring degraded digits: an exact model of the mean-reverting process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.data import digits
from tasks.mean_reverting import SCHEDULES, MeanReverting
from tasks.mixtures import fit_digits
from tasks.processes import Time, expand
from tasks.registry import models, unknown

TASKS = ("inpaint", "denoise", "super_resolve")
SIDE = 8
DIM = SIDE * SIDE


@models.register("restore")
@dataclass(frozen=True)
class Restore:
    """Exact posterior of clean digits given degraded ones, under the mean-reverting process.

    A digit x0 has the law of the Gaussian mixture fitted to the digits, and is measured as ``y = A x0 + e`` with
    ``e ~ N(0, (noise_std^2 + floor) I)``. The degraded image mu is y laid out as a picture, and states are relative to
    it: ``x - mu``. Component k of ``p(x0 | y)`` has the precision ``C_k^-1 + A^T A / v`` and a weight in proportion to
    ``w_k N(y; A m_k, A C_k A^T + v I)`` with v the variance of e, so the posterior mean under the process is that of
    a Gaussian mixture, one for every row.

    Label i is image i of the digits: that image was measured, once, with noise of a fixed seed. Samples are draws from
    ``p(x0 | y)``; the reward ``psnr`` compares them with the clean image.

    Args:
        task: inpaint (pixels of a block are missing, grey in mu), denoise (all pixels are seen), super_resolve (means
            of 2 x 2 pixels are seen, repeated in mu).
        block: missing pixels of inpaint: lower (the lower half) or centre (the 4 x 4 pixels in the middle).
        noise_std: standard deviation of the measurement noise.
        floor: variance of the measurement that is always there, so that the posterior has a density.
        num_images: number of measured images, which is the number of labels.
        ridge: variance added to every direction of the fitted covariances.
        sigma_inf: stationary noise of the process, for images in [-1, 1].
        schedule: how the process's theta runs: cosine or constant.

    Reference: Luo et al. 2023, "Image Restoration with Mean-Reverting Stochastic Differential Equations" (process);
        the posterior is in closed form.
    """

    task: str = "inpaint"
    block: str = "lower"
    noise_std: float = 0.2
    floor: float = 1e-6
    num_images: int = 256
    ridge: float = 0.01
    sigma_inf: float = 2 * 50 / 255
    schedule: str = "cosine"

    kind = "image"
    shape = (1, SIDE, SIDE)
    needs_labels = True  # without one there is no measurement

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown("task", self.task, list(TASKS), "Allowed")
        if self.block not in ("lower", "centre"):
            raise unknown("block", self.block, ["lower", "centre"], "Allowed")
        if self.schedule not in SCHEDULES:
            raise unknown("theta schedule", self.schedule, list(SCHEDULES), "Allowed")
        if self.noise_std < 0 or not self.floor > 0:
            raise ValueError(
                f"restore needs model.noise_std >= 0 and model.floor > 0, got {self.noise_std} and {self.floor}."
            )
        if self.task == "denoise" and self.noise_std == 0:
            raise ValueError(
                "model.task=denoise has nothing to remove with model.noise_std=0. Set model.noise_std=0.2."
            )
        if not 1 <= self.num_images <= len(digits.images()):
            raise ValueError(f"model.num_images must be 1 to {len(digits.images())}, got {self.num_images}.")
        if self.ridge <= 0:
            raise ValueError(f"model.ridge must be positive, got {self.ridge}.")
        _ = self.noising  # refuses a bad sigma_inf

    @property
    def num_classes(self) -> int:
        """A label for every measured image."""
        return self.num_images

    @cached_property
    def noising(self) -> MeanReverting:
        """The process object."""
        return MeanReverting(sigma_inf=self.sigma_inf, schedule=self.schedule)

    @cached_property
    def operator(self) -> np.ndarray:
        """A, (M, 64) float64."""
        if self.task == "denoise":
            return np.eye(DIM)
        if self.task == "super_resolve":
            pairs = np.kron(np.eye(SIDE // 2), np.full((1, 2), 0.5))  # means of neighbours along one axis
            return np.kron(pairs, pairs)
        missing = np.zeros((SIDE, SIDE), dtype=bool)
        if self.block == "lower":
            missing[SIDE // 2 :] = True
        else:
            missing[SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = True
        return np.eye(DIM)[~missing.ravel()]

    @property
    def variance(self) -> float:
        """Variance v of the measurement's noise."""
        return self.noise_std**2 + self.floor

    @cached_property
    def measurements(self) -> np.ndarray:
        """y of every image, (num_images, M) float64."""
        clean = digits.images()[: self.num_images].reshape(-1, DIM).astype(np.float64) @ self.operator.T
        # Drawn for all images, so that image i is measured the same whatever num_images is.
        draws = np.random.default_rng(20230).normal(size=(len(digits.images()), clean.shape[1]))
        return clean + np.sqrt(self.variance) * draws[: self.num_images]

    @cached_property
    def degraded(self) -> np.ndarray:
        """mu of every image, (num_images, 64) float64: what is seen, and grey (0) elsewhere."""
        seen = self.operator > 0
        return self.measurements @ seen

    @property
    def revision(self) -> str:
        """Hash of the measurements and of the mixture."""
        weights, means, covariances = fit_digits(self.ridge)
        found = hashlib.sha256()
        # Rounded: the last bits of a fitted covariance are those of the linear algebra of a machine.
        for values in (self.measurements, weights, means, covariances):
            found.update(np.round(values, 9).astype(np.float32).tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def posterior(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """p(x0 | y) of every image: log weights (num_images, K), means (num_images, K, 64), and the variances (K, 64)
        along the eigenvectors (K, 64, 64; columns), which do not depend on y.
        """
        weights, means, covariances = fit_digits(self.ridge)
        a, y, v = self.operator, self.measurements, self.variance
        log_weights, posterior_means, variances, vectors = [], [], [], []
        for weight, mean, covariance in zip(weights, means, covariances, strict=True):
            prior = np.linalg.inv(covariance)
            values, basis = np.linalg.eigh(prior + a.T @ a / v)
            pull = prior @ mean + y @ a / v  # (N, 64)
            posterior_means.append(pull @ basis / values @ basis.T)
            variances.append(1.0 / values)
            vectors.append(basis)
            root = np.linalg.cholesky(a @ covariance @ a.T + v * np.eye(len(a)))
            white = np.linalg.solve(root, (y - a @ mean).T)  # (M, N)
            log_weights.append(np.log(weight) - np.log(np.diag(root)).sum() - 0.5 * (white**2).sum(0))
        logits = np.stack(log_weights, axis=1)
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return logits, np.stack(posterior_means, axis=1), np.stack(variances), np.stack(vectors)

    def reference(self, count: int = 10000) -> tuple[np.ndarray, np.ndarray]:
        """Exact draws from the posteriors with a fixed seed, clamped as samples are: (count, 1, 8, 8) and labels."""
        logits, means, variances, vectors = self.posterior
        rng = np.random.default_rng(20231)
        label = np.arange(count) % self.num_images
        cumulative = np.cumsum(np.exp(logits), axis=1)[label]
        component = (rng.random((count, 1)) * cumulative[:, -1:] >= cumulative).sum(1)
        z = rng.normal(size=(count, DIM)) * np.sqrt(variances[component])
        draws = means[label, component] + np.einsum("nij,nj->ni", vectors[component], z)
        return np.clip(draws, -1, 1).astype(np.float32).reshape(-1, *self.shape), label

    def load(self, device: str) -> RestoreDenoiser:
        """The denoiser on a device."""
        return RestoreDenoiser(self, torch.device(device))


class RestoreDenoiser:
    """The exact denoiser of ``x - mu``; computes in float64 and answers in the dtype of the state."""

    def __init__(self, spec: Restore, device: torch.device) -> None:
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, spec.num_classes
        logits, means, variances, vectors = (torch.from_numpy(array).to(device) for array in spec.posterior)
        self._mu = torch.from_numpy(spec.degraded).to(device)  # (N, D)
        self._log_w = logits  # (N, K)
        self._means = means - self._mu[:, None]  # (N, K, D), of x0 - mu
        self._values, self._vectors = variances, vectors

    def _labels(self, cond: Tensor | None) -> Tensor:
        if cond is None or bool((cond >= self.num_classes).any()):
            raise ValueError(
                "model restore needs a label in every row: it names the measured image, and without one there is "
                f"nothing to restore. Set labels=cycle or a number below {self.num_classes}, and guidance=none."
            )
        return cond

    def denoise(self, x: Tensor, t: Time, cond: Tensor | None = None) -> Tensor:
        """E[x0 - mu | x_t - mu = x, mu], (B, 1, 8, 8)."""
        label = self._labels(cond)
        wide = x.double().flatten(1)[:, None, :]  # (B, 1, D)
        alpha, sigma = expand(self.process.alpha(t), wide), expand(self.process.sigma(t), wide)
        means = self._means[label]  # (B, K, D)
        variance = alpha**2 * self._values + sigma**2
        rotated = torch.einsum("bki,kij->bkj", wide - alpha * means, self._vectors)
        logits = self._log_w[label] - 0.5 * (torch.log(variance).sum(-1) + (rotated**2 / variance).sum(-1))
        shrunk = rotated * (alpha * self._values / variance)
        answers = means + torch.einsum("bkj,kij->bki", shrunk, self._vectors)
        return torch.einsum("bk,bkd->bd", torch.softmax(logits, dim=-1), answers).view(x.shape).to(x.dtype)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images in [-1, 1]: the state and mu."""
        mu = self._mu[self._labels(cond)].view(x0.shape)
        return (x0.double() + mu).clamp(-1, 1).to(x0.dtype)
