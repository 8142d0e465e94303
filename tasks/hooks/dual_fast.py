"""DualFast: extrapolation away from an earlier, noisier prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.registry import hooks, unknown


@hooks.register("dual_fast")
@dataclass(frozen=True)
class DualFast:
    """DualFast: the first-order term takes ``(1 + c) eps(x_t, t) - c eps(x_tau, tau)`` with tau noisier than t.

    A network errs less at high noise, so a share c of the difference to an earlier evaluation is error, and
    extrapolating removes it. c grows linearly in log-SNR from 0 at the first step to ``c_max`` at the last. Only the
    zeroth-order term of the update changes; derivatives are estimated from the network's own answers.

    Args:
        c_max: c at the last step. The published rule is not public; 0 is the solver without it, and values up to 0.5
            are worth a search. With an exact model the gain that remains is discretisation error in disguise.
        tau: first, or prev: which earlier evaluation is extrapolated from.

    Reference: Yu et al. 2025, "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models".
    Cost: none.
    Identities: with c_max=0 this is the solver without it.
    """

    c_max: float = 0.2
    tau: str = "first"

    def __post_init__(self) -> None:
        if self.tau not in ("first", "prev"):
            raise unknown("tau", self.tau, ["first", "prev"], "Allowed")
        if self.c_max < 0:
            raise ValueError(f"dual_fast.c_max must not be negative, got {self.c_max}.")

    def begin(self, plan: Any) -> None:
        """Nothing is remembered before the first evaluation."""
        return None

    @property
    def direction(self) -> Callable[..., tuple[Tensor, Any]]:
        """The weighted mean of the predictions, shifted by the extrapolation of the base's own; none at c_max=0.

        Raises:
            AttributeError: c_max is 0.
        """
        if self.c_max == 0:
            raise AttributeError("direction")
        return self._extrapolated

    def _extrapolated(self, plan: Any, i: int, u: Tensor, entries: Any, memory: Any) -> tuple[Tensor, Any]:
        step, back = plan.steps[i], plan.steps[i].start - 1
        base, j = entries[back], i - back
        eps = (base.seen - plan.alpha[j] * base.x0) / plan.sigma[j]
        earlier = memory
        memory = eps if memory is None or self.tau == "prev" else memory
        if earlier is None:
            return u, memory
        nodes = [lam for lam in plan.lam[:-1] if abs(lam) != float("inf")]
        share = self.c_max * min(max((plan.lam[j] - nodes[0]) / (nodes[-1] - nodes[0]), 0.0), 1.0)
        shift = share * (eps - earlier)
        # A shift of the noise by d is one of the data by -sigma / alpha d, of the velocity by what both imply.
        if step.prediction == "eps":
            return u + shift, memory
        data = -(plan.sigma[j] / plan.alpha[j]) * shift if plan.alpha[j] > 0 else 0.0 * shift
        if step.prediction == "x0":
            return u + data, memory
        linear = plan.process.kind_of_path == "linear"
        return u + (shift - data if linear else plan.alpha[j] * shift - plan.sigma[j] * data), memory
