"""A step cut in two: look (one evaluation gives the clean prediction), then move, as often as wanted, for free.

The solvers of ``tasks/solvers`` ask the model first and move afterwards. A strategy that compares several children of
one state looks once at the parent and moves every child with the prediction that it already has; the look at a child is
the first half of the child's own next step. So no evaluation is made twice, and look + move is the solver's step to the
last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.processes import transfer
from tasks.types import Noise, Reward, State


class _Known:
    """A model whose answer at one state is known; it has no other."""

    def __init__(self, process: Any, t: float, x0_hat: Tensor) -> None:
        self.process, self._t, self._x0_hat = process, t, x0_hat

    def denoise(self, x: Tensor, t: Any) -> Tensor:
        if isinstance(t, Tensor) or t != self._t:
            raise ValueError(
                f"the solver asks for a prediction at t={t} in a step that starts at t={self._t}, but this strategy "
                "moves particles with the one prediction that it has. Use a solver of one evaluation a step, such as "
                "ddim."
            )
        return self._x0_hat


def look(sampler: Any, state: State) -> Tensor:
    """The clean prediction at a state: the first half of its step, one evaluation a row."""
    return sampler.model.denoise(state.x, sampler.times[state.step], sampler.cond)


def move(sampler: Any, state: State, x0_hat: Tensor, noise: Noise) -> State:
    """The second half: the solver's step with the prediction known, no evaluation. ``noise`` is already at its step."""
    t, s = sampler.times[state.step], sampler.times[state.step + 1]
    return sampler.solver.step(_Known(sampler.model.process, t, x0_hat), state, t, s, noise)


def foresee(sampler: Any, state: State, x0_hat: Tensor, steps: int) -> Tensor:
    """A clean sample by ``steps`` deterministic steps to the data, of which the first prediction is already known.

    One step is the prediction itself. ``steps - 1`` further evaluations a row, at equal steps of time.
    """
    t, x = sampler.times[state.step], state.x
    for k in range(1, steps):
        s = sampler.times[state.step] * (1.0 - k / steps)
        x, t = transfer(sampler.model.process, x, x0_hat, t, s), s
        x0_hat = sampler.model.denoise(x, t, sampler.cond)
    return x0_hat


def judge(sampler: Any, reward: Reward, x0_hat: Tensor, noise: Noise) -> Tensor:
    """Rewards of clean predictions, (B,): tokens are drawn from their probabilities first."""
    guess = sampler.model.process.readout(x0_hat, noise)
    return reward(sampler.model.decode(guess, sampler.cond), sampler.cond)


def rows_of(slots: Tensor, particles: int) -> Tensor:
    """Places in a batch of B rows of K particles, for slots (B, k) of each row: (B k,)."""
    first = torch.arange(len(slots), device=slots.device)[:, None] * particles
    return (first + slots).flatten()


def refuse_other_solvers(recipe: Any, allow_memory: bool = True) -> None:
    """Only solvers of one evaluation a step, on falling grids, can be cut in two.

    Raises:
        ValueError: says what is wrong and what fits.
    """
    solver, name = recipe.parts.solver, recipe.strategy["name"]
    several = solver.nfe(3) != 3 or getattr(solver, "adaptive", False) or getattr(solver, "own_pace", False)
    if several or getattr(solver, "needs", "posterior_mean") != "posterior_mean":
        raise ValueError(
            f"strategy {name} reuses the prediction of every state, which needs one evaluation of the posterior mean a "
            f"step, but solver {recipe.solver['name']} works otherwise. Use solver=ddim solver.eta=1."
        )
    if not allow_memory and hasattr(solver, "start"):
        raise ValueError(
            f"strategy {name} steps rows at different times, but solver {recipe.solver['name']} keeps a memory. "
            "Use solver=ddim solver.eta=1."
        )
    refuse_travel(recipe)


def refuse_travel(recipe: Any) -> None:
    """Strategies that count steps need a grid that only falls.

    Raises:
        ValueError: says which grid rises.
    """
    if getattr(recipe.parts.times, "travels", False):
        raise ValueError(
            f"strategy {recipe.strategy['name']} needs times that only fall, but times {recipe.times['name']} jump "
            "back. Use times=uniform."
        )
