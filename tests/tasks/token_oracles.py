"""Exact answers for token solvers: one small table, its posterior by look-up, and laws of runs by enumeration.

A step of a solver that treats places independently is a matrix between the 4^4 partly masked strings, so the law of a
run of any length is exact, without a sample. The sampling error of a total variation distance is bounded as follows:
its mean is at most half the sum of the standard errors of the shares, and one row moves it by at most 1/n, so by
McDiarmid the chance of an excess above e is below exp(-2 n e^2): 3e-7, five sigma one-sided, at e = sqrt(15 / 2n).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks import registry
from tasks.models.table import Table
from tasks.noise import RowNoise
from tasks.processes import Masked
from tasks.sampler import CountedModel, Sampler

torch.set_num_threads(1)  # two on two busy cores make a step four times slower

TOK = Table(vocabulary=3, length=4, seed=5, concentration=0.25)


class Lookup:
    """The table's exact posterior, looked up: what ``table`` answers, at a tenth of its cost."""

    num_classes = 0

    def __init__(self, table: Table = TOK) -> None:
        self.table, self.shape, self.process = table, (table.length,), Masked(table.vocabulary)
        symbols = table.vocabulary + 1
        self.states = torch.cartesian_prod(*[torch.arange(symbols)] * table.length).view(-1, table.length)
        agree = (self.states[:, None] == torch.from_numpy(table.strings)) | (self.states[:, None] == table.vocabulary)
        weight = agree.all(-1).double() * torch.from_numpy(table.joint)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-300)
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(table.strings), table.vocabulary).double()
        self.posterior = torch.einsum("xs,slv->xlv", weight, one_hot)  # (X, L, V)
        self._base = symbols ** torch.arange(table.length - 1, -1, -1)
        self._loaded = table.load("cpu")

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None = None) -> Tensor:
        return self.posterior[(x * self._base).sum(1)]

    def energy_log_prob(self, tokens: Tensor, cond: Tensor | None = None) -> Tensor:
        return self._loaded.energy_log_prob(tokens)

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        return x0


def uniform(num_steps: int) -> tuple[float, ...]:
    return tuple(1.0 - i / num_steps for i in range(num_steps)) + (0.0,)


def noise_of(rows: int, seed: int = 0) -> RowNoise:
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def sampler_of(spec: Any, times: tuple[float, ...] | int, model: Any = None) -> Sampler:
    solver = registry.solvers.build(spec) if isinstance(spec, str | dict) else spec
    times = uniform(times) if isinstance(times, int) else times
    return Sampler(CountedModel(model or Lookup(), 10**7), solver, times)


def shares(x: Tensor, table: Table = TOK) -> np.ndarray:
    """The share of every string among rows, (V^L,)."""
    base = table.vocabulary ** torch.arange(table.length - 1, -1, -1)
    return torch.bincount((x * base).sum(1), minlength=len(table.joint)).numpy() / len(x)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation."""
    return 0.5 * float(np.abs(a - b).sum())


def sampling_error(law: np.ndarray, rows: int) -> float:
    """What the total variation of exact samples stays below, five sigma."""
    return 0.5 * float(np.sqrt(law * (1 - law) / rows).sum()) + math.sqrt(15 / (2 * rows))


def kernel(model: Lookup, rate: float, again: float = 0.0, probabilities: Tensor | None = None) -> np.ndarray:
    """p(x_s | x_t) between all states: masks revealed with ``rate``, tokens masked with ``again``, (X, X)."""
    states, mask = model.states, model.process.mask
    posterior = model.posterior if probabilities is None else probabilities
    masked = (states == mask)[..., None]
    keep = torch.nn.functional.one_hot(states, mask + 1).double() * (1 - again)
    keep[..., mask] = again
    reveal = torch.cat([rate * posterior, torch.full_like(posterior[..., :1], 1 - rate)], dim=-1)
    place = torch.where(masked, reveal, keep)  # (X, L, V + 1)
    found = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(states.shape[1]):
        found *= place[:, i][:, states[:, i]]
    return found.numpy()


def law(model: Lookup, kernels: Any) -> np.ndarray:
    """The law of full strings at the end of a run from all masks through the kernels, (V^L,)."""
    now = np.zeros(len(model.states))
    now[-1] = 1.0
    for each in kernels:
        now = now @ each
    full = (model.states != model.process.mask).all(1).numpy()
    assert abs(now[full].sum() - 1) < 1e-9
    return now[full]


def ancestral_law(model: Lookup, num_steps: int) -> np.ndarray:
    """Of uniform ancestral steps."""
    return law(model, [kernel(model, 1 / (num_steps - k)) for k in range(num_steps)])
