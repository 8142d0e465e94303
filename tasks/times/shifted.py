"""The shifted uniform grid of rectified-flow models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tasks.registry import times


@times.register("shifted")
@dataclass(frozen=True)
class Shifted:
    """A uniform grid that spends more of its steps near the noise, as large images need.

    ``t = shift u / (1 + (shift - 1) u)`` for u = 1, 1 - 1/N, …, 0; a run that begins at t < 1 starts at its u.

    Args:
        num_steps: number of steps N.
        shift: 1 is uniform; SD3 takes 3. FLUX's dynamic shift is ``exp(mu)``, where mu grows linearly from 0.5 at 256
            tokens to 1.15 at 4096: 3.158 for 1024 x 1024 pixels.

    Reference: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", eq. 23.
    Identities: with shift=1 this is uniform.
    """

    num_steps: int = 10
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"times.num_steps must be at least 1, got {self.num_steps}.")
        if self.shift <= 0:
            raise ValueError(f"times.shift must be above 0, got {self.shift}. Use 1 for a uniform grid.")

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """N+1 times from ``start`` to 0."""
        first = start / (self.shift - (self.shift - 1) * start)
        nodes = [first * (1 - i / self.num_steps) for i in range(self.num_steps + 1)]
        return (start, *(self.shift * u / (1 + (self.shift - 1) * u) for u in nodes[1:]))
