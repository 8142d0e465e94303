"""Unmasking that masks again (ReMDM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tasks import unmasking
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

SCHEDULES = ("cap", "rescale")


@solvers.register("remasking")
@dataclass(frozen=True)
class Remasking:
    """Remasking (ReMDM): ancestral unmasking in which a revealed token is masked again with probability varsigma.

    With ``alpha = 1 - t`` a masked token is revealed with probability ``(alpha_s - (1 - varsigma) alpha_t) / (1 -
    alpha_t)``, so the share of masks stays on schedule for any ``0 <= varsigma <= varsigma_max = min(1, (1 - alpha_s) /
    alpha_t)``: ``min(eta, varsigma_max)`` (cap) or ``eta varsigma_max`` (rescale). Mistakes of early steps can be
    revised. The last step masks nothing.

    With ``confident`` a token is masked with probability ``varsigma softmax(-psi)`` over the row's revealed tokens,
    psi the probability that it had when it was revealed: in all one token as often as each would be else. Masks are
    then revealed with the row's mean of these, so that their number stays on schedule in long strings; the law of the
    tokens is biased towards confident ones. With ``loop`` the grid has three parts: above ``t_on`` the signal rises to
    ``alpha_on`` without remasking, down to ``t_off`` it stands still while tokens are masked and revealed, and below it
    rises to 1, again without remasking.

    Without ``confident`` the single-token marginals are kept for every varsigma; the joint law is exact as steps get
    many and varsigma small, as tokens of one step are drawn independently.

    Args:
        schedule: cap or rescale.
        eta: the cap, or the factor; from 0 to 1.
        confident: let the least confident tokens be masked first.
        loop: hold the signal for a part of the grid, and remask only there.
        t_on: grid time at which the loop begins.
        t_off: grid time at which it ends.
        alpha_on: signal within the loop.
        filters: specs of filters of the token probabilities, in order.

    Reference: Wang et al. 2025, "Remasking Discrete Diffusion Models with Inference-Time Scaling", eq. 4-9 and section
        4. Their confident variant reveals masks without the remasked share, so that masks pile up.
    Cost and order: one evaluation a step; first order; stochastic.
    Identities: with eta=0 and no loop this is ``ancestral``, draw for draw.
    """

    schedule: str = "cap"
    eta: float = 0.02
    confident: bool = False
    loop: bool = False
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    stochastic = True
    remasks = True

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, list(SCHEDULES), "Allowed")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"solver.eta must be between 0 and 1, got {self.eta}. It is a probability, or a share.")
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.alpha_on < 1:
            raise ValueError(
                "remasking needs 0 < t_off < t_on < 1 and alpha_on between 0 and 1, got "
                f"{self.t_off}, {self.t_on} and {self.alpha_on}."
            )
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    @property
    def asks_once(self) -> bool:
        """Whether the model is asked at the grid's own times."""
        return not self.loop

    @property
    def own_pace(self) -> bool:
        """Whether the loop changes the times that the model is told."""
        return self.loop

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token, and in a loop some steps that remask."""
        unmasking.check_filters(self.filters, process.vocabulary)
        if self.loop and not any(self._remasks(t, s) for t, s in zip(times, times[1:], strict=False)):
            raise ValueError(
                f"no step of the grid lies between t_on={self.t_on} and t_off={self.t_off}, where the loop remasks. "
                "Use more steps, or set solver.loop=false."
            )

    def _time(self, t: float) -> float:
        """The process time of a grid time: itself, or held at ``1 - alpha_on`` within the loop."""
        if not self.loop:
            return t
        held = 1.0 - self.alpha_on
        if t >= self.t_on:
            return 1.0 - (1.0 - held) * (1.0 - t) / (1.0 - self.t_on)
        return held * min(t / self.t_off, 1.0)

    def _remasks(self, t: float, s: float) -> bool:
        return not self.loop or (t <= self.t_on + 1e-12 and s >= self.t_off - 1e-12)

    def varsigma(self, t: float, s: float) -> float:
        """The probability of remasking a token between process times t and s."""
        most = min(1.0, s / (1.0 - t)) if t < 1 else 1.0
        return min(self.eta, most) if self.schedule == "cap" else self.eta * most

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        remasks, t, s = self._remasks(t, s), self._time(t), self._time(s)
        mask, shape = model.process.mask, tuple(state.x.shape[1:])
        x0_hat, masked = model.denoise(state.x, t), state.x == mask
        varsigma: Any = self.varsigma(t, s) if remasks else 0.0
        mean, memory = varsigma, None
        if self.confident:
            psi = state.memory if state.memory is not None else torch.zeros(state.x.shape, dtype=torch.float64)
            psi = psi.to(state.x.device)
            # A row without a token yet has no softmax; its places are all masked, and have no weight.
            weights = torch.where(masked, 0.0, torch.softmax(torch.where(masked, -torch.inf, -psi), dim=1))
            varsigma = varsigma * weights
            mean = varsigma.sum(1, keepdim=True) / (~masked).sum(1, keepdim=True).clamp(min=1)
        # Written so that without remasking it is (t - s) / t to the last bit.
        rate = ((t - s) + mean * (1.0 - t)) / t
        x = unmasking.reveal(state.x, x0_hat, rate, self.filters, mask, noise)
        if self.confident:
            own = x0_hat.double().gather(-1, x.clamp(max=mask - 1)[..., None])[..., 0]
            memory = torch.where(masked, own, psi)
        again = ~masked & (noise.uniform(shape, purpose="remask") < varsigma)
        return State(torch.where(again, mask, x), x0_hat, memory, state.step + 1)
