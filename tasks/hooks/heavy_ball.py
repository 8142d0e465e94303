"""Heavy-ball momentum on any multistep update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.registry import hooks


@hooks.register("heavy_ball")
@dataclass(frozen=True)
class HeavyBall:
    """HB momentum: the direction is averaged with those before, ``v_n = (1 - beta) v_{n-1} + beta u_n``.

    u_n is the solver's own direction, the weighted mean of its predictions (an Adams-Bashforth combination of noises,
    or of data predictions). Averaging enlarges the region of stability, for artefacts at few steps and large guidance,
    and costs order: with beta < 1 the method is of first order. GHVB (``solver=ghvb``) keeps the order. A pseudo
    corrector makes every step again without momentum, so that only the predictor's states feel it.

    Args:
        beta: share of the new direction, in (0, 1].

    Reference: Wizadwongsa et al. 2024, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", section
        4.1.
    Cost: none.
    Identities: with beta=1 this is the solver without it.
    """

    beta: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"heavy_ball.beta must be in (0, 1], got {self.beta}.")

    def begin(self, plan: Any) -> None:
        """No velocity yet."""
        return None

    def check(self, plan: Any) -> None:
        """Refuse blocks: their inner steps are no sequence of directions."""
        if any(step.start > 1 for step in plan.steps) or len({step.prediction for step in plan.steps}) > 1:
            raise ValueError(
                "heavy_ball needs multistep updates of one prediction, but this schedule restarts blocks or mixes "
                "predictions. Use a multistep preset, for example dpmpp_2m."
            )

    @property
    def direction(self) -> Callable[..., tuple[Tensor, Any]]:
        """The average with the directions before; none at beta=1, where the solver keeps its own arithmetic.

        Raises:
            AttributeError: beta is 1.
        """
        if self.beta == 1:
            raise AttributeError("direction")
        return self._averaged

    def _averaged(self, plan: Any, i: int, u: Tensor, entries: Any, memory: Any) -> tuple[Tensor, Any]:
        v = u if memory is None else (1.0 - self.beta) * memory + self.beta * u
        return v, v
