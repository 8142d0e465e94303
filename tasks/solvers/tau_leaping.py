"""Tau-leaping of the masked reverse process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tasks import unmasking
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

LEAPS = ("poisson", "euler")


@solvers.register("tau_leaping")
@dataclass(frozen=True)
class TauLeaping:
    """Tau-leaping: the reverse jump process of every place with its rates held during a step.

    The concrete score of a masked place is ``p_t(x with v) / p_t(x) = (1 - t) / t p(v | x)``, and the masked process
    then jumps to v at the rate ``p(v | x) / t``. Held from t to s, a place stays masked with probability
    ``exp(-(t - s) / t)`` (poisson; the first jump is kept, as a revealed token jumps no more) or ``1 - (t - s) / t``
    (euler). The last step, to t=0, where the rate has no bound, reveals what is left.

    What differs from ``ancestral``: the rate of a place grows like 1/t within a step and is held at its beginning, so
    poisson leaps reveal too few tokens, and the last step too many at once. The places' independence within a step is
    the same error in both. Biased for few steps; both errors fall like 1 / N.

    Args:
        leap: poisson (tau-leaping) or euler (one linear step).
        filters: specs of filters of the token probabilities, in order.

    Reference: Gillespie 2001, "Approximate accelerated stochastic simulation of chemically reacting systems"; Campbell
        et al. 2022, "A Continuous Time Framework for Discrete Denoising Models", section 4.3; Lou et al. 2024,
        "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution" (concrete score, euler).
    Cost and order: one evaluation a step; first order; stochastic.
    Identities: leap=euler is ``ancestral``, draw for draw, as the rate 1/t makes one linear step exact.
    """

    leap: str = "poisson"
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    stochastic = True
    asks_once = True

    def __post_init__(self) -> None:
        if self.leap not in LEAPS:
            raise unknown("leap", self.leap, list(LEAPS), "Allowed")
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token."""
        unmasking.check_filters(self.filters, process.vocabulary)

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat = model.denoise(state.x, t)
        hazard = (t - s) / t
        rate = hazard if self.leap == "euler" or s == 0 else -math.expm1(-hazard)
        x = unmasking.reveal(state.x, x0_hat, rate, self.filters, model.process.mask, noise)
        return State(x, x0_hat, None, state.step + 1)
