"""What a trajectory costs, found by running its solver on a model that answers nothing.

A solver's evaluations depend on its schedule, not on the answers (adaptive ones aside). Where some of them cost less
than others, because guidance acts on an interval of noise levels or because steps leave out blocks of the network, the
account is kept by the same counter as that of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.noise import RowNoise
from tasks.sampler import CountedModel, Sampler


@dataclass(frozen=True)
class _Silent:
    """A model that predicts zero everywhere."""

    process: Any
    num_classes: int
    blocks: Any
    shape: tuple[int, ...] = (1,)
    is_rehearsal: bool = True

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        return x0

    @contextmanager
    def skipping(self, mask: int) -> Iterator[float]:
        yield self.blocks.share(mask)


def per_call(guidance: Any) -> tuple[int, int]:
    """Network evaluations and decoder calls of one call of a guided model, found by making one."""
    from tasks.processes import VP

    silent: Any = _Silent(VP(), 1, None)
    counted = CountedModel(silent, max_rows=1)
    model = guidance.wrap(counted)
    if hasattr(type(model), "on_grid"):
        model = model.on_grid((1.0, 0.0))
    with torch.no_grad():
        model.denoise(torch.zeros(1, 1), 0.5, torch.zeros(1, dtype=torch.int64))
    return counted.rows, counted.decoded


def rehearse(
    model: Any, solver: Any, guidance: Any, grid: tuple[float, ...], stock_steps: int | None
) -> list[tuple[int, float, int]]:
    """Count the evaluations of every step of one trajectory from pure noise along a grid.

    Args:
        model: the model plug-in, without weights.
        solver: takes the steps; not adaptive, and in no need of a calibration.
        guidance: wraps the model.
        grid: the times.
        stock_steps: the number of steps given to a stock scheduler that lays its own grid, else None.

    Returns:
        for every step its network evaluations, the same weighted by the share of the network that each takes, and the
        decoder calls of guidance.
    """
    silent: Any = _Silent(model.noising, model.num_classes, getattr(model, "blocks", None))
    counted = CountedModel(silent, max_rows=1)
    cond = torch.zeros(1, dtype=torch.int64) if model.num_classes else None
    noise: Any = RowNoise(0, torch.zeros(1, dtype=torch.int64), dtype=torch.float64)
    with torch.no_grad():
        sampler = Sampler(guidance.wrap(counted), solver, grid, cond, stock_steps)
        state, spent = sampler.start(noise), []
        while state.step < sampler.num_steps:
            before = counted.rows, counted.work, counted.decoded
            state = sampler.step(state, noise)
            spent.append((counted.rows - before[0], counted.work - before[1], counted.decoded - before[2]))
    return spent
