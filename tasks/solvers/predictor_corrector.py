"""The predictor-corrector sampler of score-based models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.processes import VP, transfer
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State


@solvers.register("predictor_corrector")
@dataclass(frozen=True)
class PredictorCorrector:
    """Predictor-corrector: a step of the reverse SDE or ODE to s, then Langevin steps at s.

    The predictor is one step of ddim with eta = 1 (``ancestral``) or eta = 0 (``ode``). A corrector step is
    ``x += e score + sqrt(2 e) z`` with ``score = (alpha x0_hat - x) / sigma^2`` at s and the step size
    ``e = 2 a (snr |z| / |score|)^2``, where ``a = 1 - beta`` of the training step on a variance-preserving process and
    1 on the others. The norms are a row's own, and |z| is sqrt(D), which Song et al. advise where there is no large
    batch to average over: a drawn |z| would make the step size depend on the noise that it scales, and the stationary
    variance a factor (D + 2) / D too large. A step is at most sigma^2, the largest that no data can make unstable; that
    matters only in a few dimensions, where a score may vanish. No corrector runs at sigma = 0.

    Args:
        predictor: ancestral or ode.
        corrector_steps: number M of Langevin steps after a predictor step.
        snr: signal-to-noise ratio of a Langevin step.
        leading_uncorrected_steps: number of first steps without a corrector, which is how any number of evaluations
            is spent exactly.

    Reference: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
        algorithms 1 and 5 and appendix G.
    Cost and order: 1 + M evaluations a step, the predictor's at t and each corrector's at s, and one for the step to
        t=0; first order (the predictor; a Langevin step does not shrink with the grid and adds a bias of its own, of
        relative size snr^2 in the variance); stochastic, unless the predictor is the ODE and M is 0.
    Identities: with corrector_steps=0 this is ddim with eta=1 or eta=0, draw for draw.
    """

    predictor: str = "ancestral"
    corrector_steps: int = 1
    snr: float = 0.16
    leading_uncorrected_steps: int = 0

    process = "gaussian"
    order = 1

    def __post_init__(self) -> None:
        if self.predictor not in ("ancestral", "ode"):
            raise unknown("predictor", self.predictor, ["ancestral", "ode"], "Allowed")
        if self.corrector_steps < 0:
            raise ValueError(f"solver.corrector_steps must be at least 0, got {self.corrector_steps}.")
        if not self.snr > 0:
            raise ValueError(
                f"solver.snr must be above 0, got {self.snr}. Set solver.corrector_steps=0 to leave the corrector out."
            )
        if self.leading_uncorrected_steps < 0:
            raise ValueError(
                f"solver.leading_uncorrected_steps must be at least 0, got {self.leading_uncorrected_steps}."
            )

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.predictor == "ancestral" or self.corrector_steps > 0

    def nfe(self, num_steps: int) -> int:
        """One a step, and M for every corrected step; the last one is not."""
        return num_steps + self.corrector_steps * max(num_steps - 1 - self.leading_uncorrected_steps, 0)

    def nfe_before_data(self, num_steps: int) -> int:
        """A run that stops before t=0 corrects its last step too."""
        return num_steps + self.corrector_steps * max(num_steps - self.leading_uncorrected_steps, 0)

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many corrected steps as fit; the rest, at most M, are uncorrected first steps."""
        corrected = (nfe - 1) // (1 + self.corrector_steps)
        steps = nfe - corrected * self.corrector_steps
        return {"leading_uncorrected_steps": steps - 1 - corrected}, steps

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        process = model.process
        x0_hat = model.denoise(state.x, t)
        x = self._predict(process, state.x, x0_hat, t, s, noise)
        if state.step >= self.leading_uncorrected_steps and process.sigma(s) > 0:
            for number in range(self.corrector_steps):
                x0_hat = model.denoise(x, s)
                z = noise.normal(tuple(x.shape[1:]), purpose=f"corrector/{number}")
                x = self._correct(process, x, x0_hat, z, s)
        return State(x, x0_hat, None, state.step + 1)

    def _predict(self, process: Any, x: Tensor, x0_hat: Tensor, t: float, s: float, noise: Noise) -> Tensor:
        if self.predictor == "ode":
            return transfer(process, x, x0_hat, t, s)
        # Written and drawn as in ddim, so that the two give the same bits.
        alpha_t, sigma_t, alpha_s, sigma_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        ratio = alpha_t / alpha_s
        nu = sigma_s / sigma_t * math.sqrt(max(sigma_t**2 - (ratio * sigma_s) ** 2, 0.0))
        carry = math.sqrt(max(sigma_s**2 - nu**2, 0.0)) / sigma_t
        x = carry * x + (alpha_s - alpha_t * carry) * x0_hat
        if nu > 0:
            x = x + nu * noise.normal(tuple(x.shape[1:]), purpose="step")
        return x

    def _correct(self, process: Any, x: Tensor, x0_hat: Tensor, z: Tensor, s: float) -> Tensor:
        sigma = process.sigma(s)
        eps = (x - process.alpha(s) * x0_hat) / sigma  # score = -eps / sigma
        squares = eps.flatten(1).square().mean(dim=1).view(-1, *[1] * (x.dim() - 1))
        size = (2 * _kept(process, s) * self.snr**2 / squares).clamp(max=1.0)  # e / sigma^2
        return x + sigma * ((2 * size).sqrt() * z - size * eps)


def _kept(process: Any, s: float) -> float:
    """Variance that one training step keeps, 1 - beta; Song et al. scale the corrector of their VP models with it."""
    if not isinstance(process, VP):
        return 1.0
    return (process.alpha(s) / process.alpha(max(s - 1 / process.num_train_steps, 0.0))) ** 2
