"""Trajectories that begin at a given state and time instead of at the sampler's own start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tasks.types import Noise, State


@dataclass(frozen=True)
class _Given:
    """An initial state that is there already."""

    x: Tensor

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        return self.x


@dataclass(frozen=True)
class Later:
    """A row's streams with steps counted from ``first``, so that a second run does not draw the first's numbers."""

    noise: Any
    first: int

    @property
    def num_rows(self) -> int:
        """B."""
        return self.noise.num_rows

    def at(self, step: int) -> Any:
        """The streams of a step of this run."""
        return self.noise.at(self.first + step)


def run_from(sampler: Any, x: Tensor, noise: Any, times: tuple[float, ...] | None = None, first: int = 0) -> State:
    """All steps from states x, (B, *shape), at the first time of the sampler's grid, or of ``times``.

    Args:
        sampler: with conditions for B rows.
        x: where the trajectories begin.
        noise: streams of B rows.
        times: another grid; the sampler's own when left out.
        first: the number of the first step, as the streams count it.
    """
    begun = replace(sampler, times=times or sampler.times, initial=_Given(x))
    return begun.run(Later(noise, first) if first else noise)
