"""Time travel: jump back by re-noising, then forward again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasks import registry
from tasks.registry import times


@times.register("travel")
@dataclass(frozen=True)
class Travel:
    """Another grid, walked with jumps back: after ``length`` steps the state is noised again and they are repeated.

    The state goes back by the forward process with fresh noise, ``x_t = (alpha_t / alpha_s) x_s + std z``, and any
    solver starts afresh from there. A jump costs nothing; the repeated steps cost what steps cost.

    Args:
        base: spec of the grid that is walked.
        length: steps that a jump goes back over.
        repeats: how often each stretch is walked in all; 1 is the grid itself.
        first: number of the step after which travelling begins.
        last: number of the step after which it ends; null means at the last step but one (no jump from finished
            samples).

    Reference: Lugmayr et al. 2022, "RePaint", section 4.2 (resampling); Yu et al. 2023, "FreeDoM" (time travel).
    Identities: with repeats=1 this is the base grid.
    """

    base: dict[str, Any] = field(default_factory=lambda: {"name": "uniform", "num_steps": 10})
    length: int = 2
    repeats: int = 2
    first: int = 0
    last: int | None = None

    travels = True

    def __post_init__(self) -> None:
        if self.length < 1 or self.repeats < 1 or self.first < 0:
            raise ValueError(
                "travel needs length >= 1, repeats >= 1 and first >= 0, got "
                f"{self.length}, {self.repeats}, {self.first}."
            )
        if getattr(self.inner, "travels", False) or self.inner.name == "stock" or hasattr(self.inner, "calibrate"):
            raise ValueError(
                f"times.base must be a grid of its own, got {self.inner.name}. Use uniform, karras, explicit, …"
            )

    @cached_property
    def inner(self) -> Any:
        """The base grid."""
        return registry.times.build(self.base)

    @cached_property
    def path(self) -> tuple[int, ...]:
        """The nodes of the base grid in the order in which they are visited."""
        steps = self.inner.num_steps
        last = steps - 1 if self.last is None else min(self.last, steps - 1)
        here = min(self.first, steps)
        visited = list(range(here + 1))
        while here < steps:
            there = min(here + self.length, last)
            if there <= here:
                visited += range(here + 1, steps + 1)
                break
            for k in range(self.repeats):
                visited += range(here + (k == 0), there + 1)
            here = there
        return tuple(visited)

    @property
    def num_steps(self) -> int:
        """Steps of the whole walk, jumps included."""
        return len(self.path) - 1

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]:
        """The times in the order in which they are visited; they rise where the walk jumps back."""
        nodes = self.inner(process, start)
        return tuple(nodes[i] for i in self.path)
