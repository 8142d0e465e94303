"""The protocols of the science, and the plain data that passes between plug-ins.

A plug-in is a frozen dataclass whose fields are its hyper-parameters; it satisfies one of these protocols by shape, not
by inheritance. ``orchestrator/ports.py`` holds the three ports that face outward, and the search protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tasks.account import Account


class Noise(Protocol):
    """Random numbers of a batch of rows; each row has its own stream (see ``tasks/noise.py``)."""

    num_rows: int
    indices: Tensor

    def normal(self, shape: tuple[int, ...], purpose: str) -> Tensor: ...
    def uniform(self, shape: tuple[int, ...], purpose: str) -> Tensor: ...
    def at(self, step: int) -> Noise: ...
    def slot(self, slot: int | Tensor) -> Noise: ...
    def repeat(self, particles: int) -> Noise: ...


@runtime_checkable
class Model(Protocol):
    """A loaded denoiser.

    ``denoise(x, t, cond)`` is the posterior mean E[x_0 | x_t = x]: (B, *shape) for a Gaussian process, and (B, L, V)
    class probabilities for a masked one. ``cond`` is (B,) int64 labels, where ``num_classes`` means "no label".
    ``t`` is one time, or a float64 tensor with one time a row, (B,). ``decode`` maps clean states to what is stored;
    in a model whose states are relative to its condition, with the help of the labels. Where a stored sample has
    another shape than a state, the model has ``sample_shape`` and ``encode``, the inverse of ``decode``. A token model
    whose law can be written down has ``energy_log_prob(tokens, cond)`` (``tasks/autoregressive.py``).
    """

    process: Any
    shape: tuple[int, ...]
    num_classes: int

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor: ...
    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor: ...


class Conditioned(Protocol):
    """A model with its conditions already given: what a solver sees.

    ``select`` is the same for some of the rows. A token model that gives ``energy_log_prob`` knows the log-probability
    of full strings, K of each row, rows outermost: (B K, L) int64 -> (B K,) float64.
    """

    process: Any

    def denoise(self, x: Tensor, t: float | Tensor) -> Tensor: ...
    def select(self, index: Tensor) -> Conditioned: ...
    def energy_log_prob(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class State:
    """Where trajectories stand. Every tensor, inside ``memory`` too, has the particle axis first.

    Attributes:
        x: state at the current time, (B, *shape).
        x0_hat: the last clean prediction, or None before the first evaluation.
        memory: what a multistep solver remembers: any nest of tensors, tuples and dicts.
        step: index of the step that comes next.
    """

    x: Tensor
    x0_hat: Tensor | None = None
    memory: Any = None
    step: int = 0


@dataclass(frozen=True)
class Samples:
    """What a strategy returns: clean states (B, *shape) and further columns of its own, each (B,) or (B, N)."""

    x0: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Solver(Protocol):
    """One step from ``t`` to ``s < t``. Declares the ``process`` kind it can step and its ``order`` of accuracy."""

    process: str
    order: int
    stochastic: bool

    def step(self, model: Conditioned, state: State, t: float, s: float, noise: Noise) -> State: ...
    def nfe(self, num_steps: int) -> int: ...


class Times(Protocol):
    """A discretisation: N+1 decreasing times, from ``start`` (1 is pure noise) to the data."""

    num_steps: int

    def __call__(self, process: Any, start: float = 1.0) -> tuple[float, ...]: ...


class Initial(Protocol):
    """Where a trajectory begins: at which time, and the states there, (B, *shape), for ``evaluations`` calls."""

    evaluations: int

    def start(self, process: Any) -> float: ...
    def __call__(self, sampler: Any, noise: Noise) -> Tensor: ...


Reward = Callable[[Tensor, Tensor | None], Tensor]


class Strategy(Protocol):
    """Decides how many trajectories run and which survive; owns the time loop."""

    @property
    def particles(self) -> int: ...
    @property
    def uses_reward(self) -> bool: ...
    def account(self, evaluations: Sequence[int]) -> Account: ...
    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples: ...


class Scorer(Protocol):
    """One more column: ``(samples, cond) -> (B,)`` for a reward, ``(B, D)`` for features.

    Features that compare a row with the row of another recipe at the same index also have ``companion(recipe)``, that
    recipe, and are called with its samples as a third argument.

    Where the answer depends on which row a sample is, as with a measurement of its own, the plug-in has
    ``at(indices)``, which gives the scorer of those rows.
    """

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor: ...


Rows = Mapping[str, np.ndarray]


def sample_shape(model: Any) -> tuple[int, ...]:
    """The shape of a decoded sample: a model whose states are latents has a ``sample_shape`` beside its ``shape``."""
    return tuple(getattr(model, "sample_shape", model.shape))


class Metric(Protocol):
    """Folds rows into a few numbers. Merging is associative, so shards just add up.

    ``influence`` gives each row's first-order contribution to each value (mean zero): its spread divided by sqrt(n) is
    the value's standard error (the infinitesimal jackknife), and differences of two trials' influences on the same
    indices give the paired one.
    """

    def needs(self) -> tuple[Mapping[str, Any], ...]: ...
    def summarize(self, rows: Rows) -> Any: ...
    def merge(self, a: Any, b: Any) -> Any: ...
    def compute(self, summary: Any, reference: Any) -> dict[str, float]: ...
    def influence(self, summary: Any, reference: Any, rows: Rows) -> dict[str, np.ndarray]: ...


def reindex(tree: Any, index: Tensor) -> Any:
    """Keep, drop or copy particles: index the first axis of every tensor in a nest of containers.

    The one function through which a strategy moves particles, so that no field can be forgotten. Objects with a
    ``reindex`` method handle themselves; numbers, strings and None stay.
    """
    if isinstance(tree, Tensor):
        return tree[index]
    if hasattr(tree, "reindex"):
        return tree.reindex(index)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: reindex(getattr(tree, f.name), index) for f in fields(tree)})
    if isinstance(tree, Mapping):
        return {key: reindex(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(reindex(value, index) for value in tree)
    return tree
