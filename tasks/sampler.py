"""Sampler: model, solver, times and conditions in one object; all that a strategy sees. And the counters around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tasks.types import Model, Noise, State, reindex


class CountedModel:
    """Counts network evaluations and decoder calls, one per row and call, and bounds how many rows one call takes.

    Guidance wraps this object, so that a method which asks twice is charged twice.

    Attributes:
        rows: evaluations so far.
        work: the same with each evaluation weighted by the share of the network's multiply-adds that it takes: less
            than ``rows`` where steps leave out blocks.
        energies: token strings whose log-probability was asked for, each a pass of a second network or a look-up.
    """

    def __init__(self, model: Model, max_rows: int) -> None:
        self._model, self.max_rows, self._share = model, max_rows, 1.0
        self._instead: Callable[..., Tensor] | None = None
        self.rows, self.decoded, self.energies, self.work = 0, 0, 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The model's answer for any number of rows."""
        return self._call(self._instead or self._model.denoise, x, (t,), cond)

    @property
    def inner(self) -> Model:
        """The model that is counted."""
        return self._model

    def other(
        self,
        denoise: Callable[..., Tensor],
        x: Tensor,
        t: float | Tensor,
        cond: Tensor | None,
        share: Callable[[], float] | None = None,
    ) -> Tensor:
        """The answer of another network, or of this one in another way, charged to the same account.

        Args:
            denoise: gives the answer.
            x, t, cond: what it is asked.
            share: called afterwards, gives its multiply-adds in units of the counted network's; one when left out.
        """
        answer = self._call(denoise, x, (t,), cond)
        if share is not None:
            self.work += len(x) * (share() - self._share)
        return answer

    @contextmanager
    def skipping(self, mask: int) -> Iterator[None]:
        """Within, the network runs without the blocks of a mask, and costs less."""
        before = self._share
        with self._model.skipping(mask) as self._share:  # type: ignore[attr-defined]
            try:
                yield
            finally:
                self._share = before

    @contextmanager
    def answering(self, denoise: Callable[..., Tensor], share: float) -> Iterator[None]:
        """Within, evaluations are answered in another way, which takes a share of the network's multiply-adds."""
        before = self._instead, self._share
        self._instead, self._share = denoise, share
        try:
            yield
        finally:
            self._instead, self._share = before

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The model's decoder."""
        self.decoded += len(x0)
        return self._model.decode(x0, cond)

    @property
    def maps(self) -> bool:
        """Whether the model has a flow map."""
        return hasattr(self._model, "flow_map")

    def flow_map(self, x: Tensor, t: float | Tensor, s: float | Tensor, cond: Tensor | None) -> Tensor:
        """The model's flow map for any number of rows; an evaluation like any other."""
        return self._call(self._model.flow_map, x, (t, s), cond)  # type: ignore[attr-defined]

    def energy_log_prob(self, tokens: Tensor, cond: Tensor | None) -> Tensor:
        """Log-probability of full token strings, (N, L) int64 -> (N,) float64; counted in ``energies``."""
        self.energies += len(tokens)
        return self._split(self._model.energy_log_prob, tokens, (), cond)  # type: ignore[attr-defined]

    def _call(
        self, function: Callable[..., Tensor], x: Tensor, times: tuple[float | Tensor, ...], cond: Tensor | None
    ) -> Tensor:
        self.rows += len(x)
        self.work += len(x) * self._share
        return self._split(function, x, times, cond)

    def _split(
        self, function: Callable[..., Tensor], x: Tensor, times: tuple[float | Tensor, ...], cond: Tensor | None
    ) -> Tensor:
        if len(x) <= self.max_rows:
            return function(x, *times, cond)
        places = [slice(i, i + self.max_rows) for i in range(0, len(x), self.max_rows)]
        parts = [
            function(x[p], *(t[p] if isinstance(t, Tensor) else t for t in times), None if cond is None else cond[p])
            for p in places
        ]
        return torch.cat(parts)


@dataclass
class _Tally:
    rows: int = 0
    seconds: float = 0.0
    reused: int = 0

    def add(self, rows: int, seconds: float, reused: int) -> None:
        self.rows, self.seconds, self.reused = self.rows + rows, self.seconds + seconds, self.reused + reused


class CountedReward:
    """Counts and times reward calls, one per sample, and refuses answers that are no rewards.

    A reward whose answer depends on the row (``measurement``) is asked about the rows of ``indices``: as many samples
    as there are, or K of each, rows outermost. A strategy that asks about other rows says which:
    ``reward.at(indices)``.

    Args:
        scorer: the reward.
        name: its name, for messages.
        indices: sample indices of the rows, (B,) int64.
    """

    def __init__(self, scorer: Any, name: str, indices: Tensor | None = None) -> None:
        self._plugin, self._name, self._indices = scorer, name, indices
        self._tally = _Tally()  # shared with what ``at`` returns
        self._of_rows: dict[int, Any] = {}

    @property
    def rows(self) -> int:
        """Samples that were scored so far."""
        return self._tally.rows

    @property
    def seconds(self) -> float:
        """Seconds of scoring so far, wherever that was done."""
        return self._tally.seconds

    @property
    def reused(self) -> int:
        """Samples whose value was known."""
        return self._tally.reused

    @property
    def scorer(self) -> Any:
        """The reward itself, of these rows where it depends on them; what is asked of it directly is not counted."""
        return self._scorer(len(self._indices) if self._indices is not None else 0)

    def at(self, indices: Tensor) -> CountedReward:
        """The same reward and count for other rows, (B,) int64 sample indices."""
        other = CountedReward(self._plugin, self._name, indices)
        other._tally = self._tally
        return other

    def _scorer(self, count: int) -> Any:
        if not hasattr(self._plugin, "at"):
            return self._plugin
        if self._indices is None or not len(self._indices) or count % len(self._indices):
            known = "no rows" if self._indices is None else f"{len(self._indices)} rows"
            raise ValueError(
                f"reward {self._name} depends on the row, but was asked about {count} samples of {known}. Say which "
                "rows they belong to: reward.at(indices)."
            )
        if count not in self._of_rows:
            indices = self._indices.repeat_interleave(count // len(self._indices))
            self._of_rows[count] = self._plugin.at(indices)
        return self._of_rows[count]

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        scorer, began = self._scorer(len(samples)), time.perf_counter()
        # One that remembers, or works elsewhere, knows better what a call took.
        known = [getattr(scorer, name, None) for name in ("seconds", "reused")]
        values = scorer(samples, cond)
        took = time.perf_counter() - began if known[0] is None else scorer.seconds - known[0]
        self._tally.add(len(samples), took, 0 if known[1] is None else scorer.reused - known[1])
        if values.shape != (len(samples),):
            raise ValueError(
                f"reward {self._name} returned shape {tuple(values.shape)} for {len(samples)} samples; it must return "
                "one number a sample."
            )
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(f"reward {self._name} returned {values[row].item()} for row {row} of a batch.")
        return values


@dataclass
class _Conditioned:
    """What a solver sees during one step.

    Where the guided model has two predictions, the solver steps with the one that re-noises, and ``shift`` remembers by
    how much the guided one differs at the step's first evaluation.
    """

    model: Model
    cond: Tensor | None
    shift: Tensor | None = None

    @property
    def process(self) -> Any:
        return self.model.process

    def denoise(self, x: Tensor, t: float | Tensor) -> Tensor:
        if not hasattr(type(self.model), "both"):
            return self.model.denoise(x, t, self.cond)
        guided, renoising = self.model.both(x, t, self.cond)  # type: ignore[attr-defined]
        if self.shift is None:
            self.shift = guided - renoising
        return renoising

    @property
    def evaluations(self) -> int:
        """Network evaluations of all rows so far."""
        return self.model.rows  # type: ignore[attr-defined]

    def some(self, rows: Tensor) -> _Conditioned:
        """The same for some rows: their indices, (b,) int64."""
        return _Conditioned(self.model, None if self.cond is None else self.cond[rows])

    def select(self, index: Tensor) -> _Conditioned:
        return _Conditioned(self.model, reindex(self.cond, index))

    def energy_log_prob(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of K full strings of each row, rows outermost: (B K, L) -> (B K,)."""
        cond = self.cond
        if cond is not None:
            cond = cond.repeat_interleave(len(tokens) // len(cond))
        return self.model.energy_log_prob(tokens, cond)  # type: ignore[attr-defined]

    def skipping(self, mask: int) -> AbstractContextManager[Any]:
        return self.model.skipping(mask)  # type: ignore[attr-defined]

    def answering(self, denoise: Callable[..., Tensor], share: float) -> AbstractContextManager[Any]:
        return self.model.answering(denoise, share)  # type: ignore[attr-defined]

    @property
    def maps(self) -> bool:
        # Asked of the class: guidance hands unknown names on to the model inside, whose map is not the guided one.
        return hasattr(type(self.model), "flow_map") and getattr(self.model, "maps", True)

    def flow_map(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        return self.model.flow_map(x, t, s, self.cond)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Sampler:
    """Everything that it takes to run trajectories.

    Attributes:
        model: the denoiser, counted and guided.
        solver: takes one step.
        times: N+1 times; a stock scheduler's own grid may repeat one.
        cond: labels of the rows, (B,) int64, or None.
        stock_steps: the number of steps given to a stock scheduler that lays its own grid, else None.
        initial: begins the trajectories; None draws the prior.
        resume: continues from kept states and leaves new ones; None begins at the start.
    """

    model: Model
    solver: Any
    times: tuple[float, ...]
    cond: Tensor | None = None
    stock_steps: int | None = None
    initial: Any = None
    resume: Any = None

    def __post_init__(self) -> None:
        if hasattr(type(self.model), "on_grid"):  # guidance that differs from step to step
            object.__setattr__(self, "model", self.model.on_grid(self.times))  # type: ignore[attr-defined]

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.times) - 1

    def start(self, noise: Noise) -> State:
        """The state at the first time."""
        if self.initial is None:
            x = self.model.process.prior(self.model.shape, noise.at(-1), self.times[0])
        else:
            x = self.initial(self, noise.at(-1))
        return State(x, None, self._memory(0), 0)

    def _memory(self, first: int) -> Any:
        """A solver's memory at the beginning of the falling stretch of the grid that starts at node ``first``."""
        if not hasattr(self.solver, "start"):
            return None
        if self.stock_steps is not None:
            return self.solver.start(self.model.process, self.times, stock_steps=self.stock_steps)
        last = first + 1
        while last + 1 < len(self.times) and self.times[last + 1] <= self.times[last]:
            last += 1
        return self.solver.start(self.model.process, self.times[first : last + 1])

    def step(self, state: State, noise: Noise) -> State:
        """Step number ``state.step``; where the grid rises, the state is noised again and the solver starts afresh."""
        i = state.step
        t, s = self.times[i], self.times[i + 1]
        if s > t and self.stock_steps is None:
            x = self.model.process.renoise(state.x, t, s, noise.at(i))
            return State(x, state.x0_hat, self._memory(i + 1), i + 1)
        guided = self.model.at_step(i) if hasattr(type(self.model), "at_step") else self.model  # type: ignore[attr-defined]
        model = _Conditioned(guided, self.cond)
        state = self.solver.step(model, state, t, s, noise.at(i))
        if model.shift is None:
            return state
        x0_hat = None if state.x0_hat is None else state.x0_hat + model.shift
        return replace(state, x=state.x + self.model.process.alpha(s) * model.shift, x0_hat=x0_hat)

    def run(self, noise: Noise) -> State:
        """All steps of one trajectory a row."""
        state = self.start(noise) if self.resume is None else self.resume.begin(self, noise)
        while state.step < self.num_steps:
            state = self.step(state, noise)
            if self.resume is not None:
                self.resume.passed(state)
        return state

    def repeat(self, particles: int) -> Sampler:
        """The same for B rows of K particles each, rows outermost."""
        return replace(self, cond=None if self.cond is None else self.cond.repeat_interleave(particles))

    def select(self, index: Tensor) -> Sampler:
        """The same for other rows: the conditions follow the particles."""
        return replace(self, cond=reindex(self.cond, index))
