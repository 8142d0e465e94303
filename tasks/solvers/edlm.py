"""Energy-based importance sampling of clean token strings (EDLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import unmasking
from tasks.registry import models, solvers
from tasks.types import Conditioned, Noise, State


@solvers.register("edlm")
@dataclass(frozen=True)
class EDLM:
    """EDLM: draw k clean strings from the factorised denoiser and keep one by the energy of a model of whole strings.

    With candidates ``x0^j ~ q(x0 | x_t)``, independent places, one is kept with weight ``w_j = exp(-E_j /
    temperature)`` and ``-E = log p(x0) - log q(x0 | x_t)``: the model's log-probability of the whole string against
    that of the candidate's own draw (over the masked places: elsewhere it has no choice). Then each mask is revealed
    with probability (t - s) / t to that string's token. So the dependence between tokens of one step, which independent
    draws lose, comes back as k grows. The weights are normalised among the k, which leaves a bias of order 1/k at
    temperature 1. Outside of the window the step is ``ancestral``'s.

    Args:
        k: candidates.
        temperature: above 0; 1 is importance sampling, less is greedier.
        window_low: lowest time at which a step begins that weighs candidates.
        window_high: highest such time. A run of few steps wants 0 and 1.
        filters: specs of filters of the token probabilities, in order; q is then the filtered law, and the target is
            still p, on what q can draw.

    Reference: Xu et al. 2024, "Energy-Based Diffusion Language Models for Text Generation", algorithm 1. The sign is
        that of the paper; the released code's is the opposite, which drives samples away (its issue 3).
    Cost and order: one evaluation a step and, within the window, k log-probabilities of whole strings, which the rows
        count as ``energy_calls``; the plan has no place for them, so ``strategy.budget`` does not cap them. First order
        for few candidates; stochastic.
    Identities: with k=1 this is ``ancestral``, draw for draw.
    """

    k: int = 2
    temperature: float = 1.0
    window_low: float = 0.4
    window_high: float = 0.6
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    stochastic = True
    own_pace = True  # asks the model for more than its prediction

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(
                f"edlm needs k >= 1 and temperature above 0, got {self.k} and {self.temperature}. The "
                "paper has 2 and 1."
            )
        if not 0 <= self.window_low <= self.window_high <= 1:
            raise ValueError(
                "edlm needs 0 <= window_low <= window_high <= 1, got "
                f"{self.window_low} and {self.window_high}. 0 and 1 are every step."
            )
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token, and a window that some step begins in."""
        unmasking.check_filters(self.filters, process.vocabulary)
        if not any(self._weighs(t) for t in times[:-1]):
            raise ValueError(
                f"no step begins between window_low={self.window_low} and window_high={self.window_high}, so edlm "
                f"would be ancestral sampling. Widen the window (0 to 1 is every step); the times are {list(times)}."
            )

    def check_recipe(self, recipe: Any) -> None:
        """A model that knows the probability of whole strings."""
        if "energy_log_prob" not in getattr(recipe.parts.model, "gives", ()):
            gives = {n: getattr(models.get(n), "gives", ()) for n in models.names()}
            fitting = [n for n, given in gives.items() if isinstance(given, tuple) and "energy_log_prob" in given]
            raise ValueError(
                f"solver edlm needs a model that gives the log-probability of whole strings, but model "
                f"{recipe.model['name']} does not. Models that fit: {', '.join(fitting)}."
            )

    def _weighs(self, t: float) -> bool:
        return self.window_low <= t <= self.window_high

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat, masked = model.denoise(state.x, t), state.x == model.process.mask
        probabilities = unmasking.filtered(x0_hat, self.filters)
        clean = unmasking.draw(probabilities, noise, "token")
        if self.k > 1 and self._weighs(t):
            others = [unmasking.draw(probabilities, noise, f"candidate-{j}") for j in range(1, self.k)]
            candidates = torch.where(masked[:, None], torch.stack([clean, *others], dim=1), state.x[:, None])
            clean = self._kept(model, probabilities, candidates, masked, noise)
        revealed = masked & (noise.uniform(tuple(state.x.shape[1:]), purpose="reveal") < (t - s) / t)
        return State(torch.where(revealed, clean, state.x), x0_hat, None, state.step + 1)

    def _kept(self, model: Conditioned, q: Tensor, candidates: Tensor, masked: Tensor, noise: Noise) -> Tensor:
        """One of the candidates (B, k, L) of each row, by weight; (B, L)."""
        log_p = model.energy_log_prob(candidates.flatten(0, 1)).view(candidates.shape[:2]).double()
        drawn = q[:, None].expand(-1, self.k, -1, -1).gather(-1, candidates.clamp(max=q.shape[-1] - 1)[..., None])
        log_q = torch.where(masked[:, None], torch.log(drawn[..., 0]), 0.0).sum(-1)
        weights = torch.softmax(log_weights(log_p, log_q) / self.temperature, dim=1)
        # Where the whole-string model excludes every candidate, they are as good as each other.
        weights = torch.where(torch.isneginf(log_p).all(1, keepdim=True), 1.0 / self.k, weights)
        pick = unmasking.draw(weights[:, None], noise, "pick")[:, 0]
        return candidates[torch.arange(len(pick), device=pick.device), pick]


def log_weights(log_p: Tensor, log_q: Tensor) -> Tensor:
    """-E of candidates, ``log p(x0) - log q(x0 | x_t)``."""
    return log_p - log_q
