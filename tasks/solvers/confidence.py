"""Parallel decoding of masked tokens in the order of confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import unmasking
from tasks.registry import solvers, unknown
from tasks.types import Conditioned, Noise, State

CONFIDENCES = ("sampled", "top", "margin", "entropy")
QUOTAS = ("cosine", "linear")


@solvers.register("confidence")
@dataclass(frozen=True)
class Confidence:
    """Confidence decoding: draw every masked token, keep the most confident, mask the others again (MaskGIT, LLaDA).

    At time s a row has ``n cos(pi/2 (1 - s))`` (cosine) or ``n s`` (linear) of its n masks left, rounded down; the
    quota is each row's own. What decides about a place is

    * sampled: log-probability of the token that was drawn there;
    * top: log-probability of the likeliest token;
    * margin: difference between the two likeliest probabilities;
    * entropy: minus the entropy of the place.

    **Biased by design** with ``sampled``, at any number of steps: to keep the likeliest draws is to favour likely
    tokens. On the table of the tests (3^4 strings) one token a step ends at total variation .52 from the exact law, two
    a step at .38; Gumbel noise of scale 4.5 on the confidence brings it to about .05. The other three look at the law
    of a place and not at its draw: one token a step is then exact in law (.003, the sampling error), several a step
    leave the error of drawing them independently. Filters bias all of them.

    Args:
        confidence: sampled, top, margin or entropy.
        quota: cosine or linear.
        gumbel: scale of Gumbel noise on the confidence (float64).
        anneal: multiply that scale by s, so that late steps are greedy, as MaskGIT does.
        filters: specs of filters of the token probabilities, in order; confidence is that of the filtered law. LLaDA's
            default is a temperature of 0.

    Reference: Chang et al. 2022, "MaskGIT: Masked Generative Image Transformer", section 3.2; Nie et al. 2025, "Large
        Language Diffusion Models", appendix (low-confidence remasking, linear); Kim et al. 2025, "Train for the Worst,
        Plan for the Best" (margin).
    Cost and order: one evaluation a step; biased with sampled, else first order; stochastic, unless
        a temperature of 0 meets gumbel=0.
    """

    confidence: str = "sampled"
    quota: str = "cosine"
    gumbel: float = 0.0
    anneal: bool = False
    filters: tuple[dict[str, Any], ...] = ()

    process = "masked"
    order = 1
    asks_once = True

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise unknown("confidence", self.confidence, list(CONFIDENCES), "Allowed")
        if self.quota not in QUOTAS:
            raise unknown("quota", self.quota, list(QUOTAS), "Allowed")
        if not self.gumbel >= 0:
            raise ValueError(f"solver.gumbel must be at least 0, got {self.gumbel}. It scales noise on the confidence.")
        object.__setattr__(self, "filters", unmasking.completed(self.filters))

    @property
    def stochastic(self) -> bool:
        """Whether steps draw anything: at a temperature of 0 only the noise on the confidence is left."""
        return self.gumbel > 0 or not any(f.get("temperature") == 0 for f in self.filters)

    def nfe(self, num_steps: int) -> int:
        """One evaluation a step."""
        return num_steps

    def fit(self, nfe: int) -> tuple[dict[str, Any], int]:
        """As many steps as evaluations."""
        return {}, nfe

    def check(self, process: Any, times: Any) -> None:
        """Filters that leave a token."""
        unmasking.check_filters(self.filters, process.vocabulary)

    def start(self, process: Any, times: tuple[float, ...]) -> dict[str, Any]:
        """The quota at the beginning; how many masks a row has there is not known yet."""
        return {"share": self._share(times[0]), "masks": None}

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State:
        """From t to s."""
        x0_hat, masked = model.denoise(state.x, t), state.x == model.process.mask
        share, masks = state.memory["share"], state.memory["masks"]
        masks = masked.sum(1) if masks is None else masks
        # 1e-9: 4 masks times a quarter is one, also where the times were added up from thirds.
        remaining = torch.floor(masks * (self._share(s) / share) + 1e-9).long()
        probabilities = unmasking.filtered(x0_hat, self.filters)
        drawn = unmasking.draw(probabilities, noise, "token")
        keys = self._confidence(probabilities, drawn)
        scale = self.gumbel * (s if self.anneal else 1.0)
        if scale > 0:
            uniforms = noise.uniform(tuple(state.x.shape[1:]), purpose="confidence")
            keys = keys - scale * torch.log(-torch.log(uniforms))
        kept = unmasking.choose(keys, masked, masked.sum(1) - remaining)
        x = torch.where(kept, drawn, state.x)
        return State(x, x0_hat, {"share": share, "masks": masks}, state.step + 1)

    def _share(self, t: float) -> float:
        """Share of masks at time t."""
        return math.sin(math.pi / 2 * t) if self.quota == "cosine" else t

    def _confidence(self, probabilities: Tensor, drawn: Tensor) -> Tensor:
        """(B, L) float64."""
        if self.confidence == "sampled":
            return torch.log(probabilities.gather(-1, drawn[..., None])[..., 0])
        if self.confidence == "entropy":
            return -torch.special.entr(probabilities).sum(-1)
        top = probabilities.topk(2, dim=-1).values
        return torch.log(top[..., 0]) if self.confidence == "top" else top[..., 0] - top[..., 1]
