"""Trials that begin alike: the state after k steps, kept under a key of all that determines it.

A schedule's first k steps and k + 1 times, with the recipe around them, determine the state there bit for bit. So a
trial whose schedule differs from an earlier one in later steps only continues from the kept state, and its rows are the
same as if it had begun at the noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tasks.integrator import Entry
from tasks.recipe import Recipe
from tasks.registry import identity, model_identity
from tasks.types import Noise, State

FIELDS = ("x", "seen", "x0", "f")


class States(Protocol):
    """Where states are kept: a bounded cache, in which any of them may be missing at any time.

    ``reused`` adds up the evaluations that were not made because of it.
    """

    reused: int

    def load(self, key: str, first: int) -> Mapping[str, np.ndarray] | None: ...
    def save(self, key: str, first: int, arrays: Mapping[str, np.ndarray]) -> None: ...


def keys(recipe: Recipe) -> tuple[str, ...]:
    """Key of the state at the end of every step of the grid but the last; empty where states cannot be shared.

    They can where the solver follows a schedule and nothing else looks at the trajectory: one particle, no hooks, no
    calibration, no guidance that knows its step or remembers earlier ones, a grid that only falls.
    """
    p = recipe.parts
    grid, stock_steps = recipe.grid
    shared = hasattr(p.solver, "prefix") and p.strategy.name == "single" and not recipe.calibrations
    shared = shared and not getattr(p.guidance, "follows_grid", False) and not getattr(p.guidance, "remembers", False)
    if not shared or stock_steps is not None or getattr(p.times, "travels", False):
        return ()
    around = {
        "model": model_identity(recipe.model),
        "revision": p.model.revision,
        "guidance": identity(recipe.guidance),
        "initial": recipe.initial,
        "revisions": [getattr(part, "revision", None) for part in (p.guidance, p.initial)],
        "labels": recipe.labels,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "numerics": f"{recipe.device}/{recipe.dtype}",
    }
    state = hashlib.sha256(json.dumps(around, sort_keys=True).encode())
    found = []
    for piece in p.solver.prefix(p.model.noising, grid)[:-1]:
        state.update(json.dumps(piece).encode())
        found.append(state.hexdigest()[:32])
    return tuple(found)


@dataclass
class Resume:
    """One block of rows that may continue from kept states and leaves its own.

    Attributes:
        keys: of the states at the end of every step but the last.
        states: where they are.
        first: index of the block's first row.
        counted: the model that counts evaluations: its count continues too, so that rows cost what they always do.
        reused: evaluations of one row that were not made.
    """

    keys: tuple[str, ...]
    states: States
    first: int
    counted: Any
    reused: int = 0

    def begin(self, sampler: Any, noise: Noise) -> State:
        """The longest kept beginning, or the start."""
        fresh = sampler.start(noise)
        for k in range(len(self.keys), 0, -1):
            arrays = self.states.load(self.keys[k - 1], self.first)
            state = None if arrays is None else self._restored(fresh, arrays, k)
            if state is not None:
                return state
        return fresh

    def _restored(self, fresh: State, arrays: Mapping[str, np.ndarray], k: int) -> State | None:
        plan = fresh.memory["plan"]
        done = plan.groups[k - 1].stop
        needed = min(done, plan.depth)
        count = int(arrays["entries"].item())
        x = torch.from_numpy(arrays["x"].copy()).to(fresh.x)
        if count < needed or x.shape != fresh.x.shape:
            return None  # left by a schedule that looks back less far
        entries = tuple(
            Entry(*(torch.from_numpy(arrays[f"{name}.{j}"].copy()).to(fresh.x) for name in FIELDS))
            for j in range(needed)
        )
        self.reused = int(arrays["nfe"].item())
        self.counted.rows += self.reused * len(x)
        self.counted.work += float(arrays["work"].item() if "work" in arrays else self.reused) * len(x)
        memory = fresh.memory | {"entries": entries, "group": k}
        return replace(fresh, x=x, x0_hat=torch.from_numpy(arrays["x0_hat"].copy()).to(fresh.x), memory=memory, step=k)

    def passed(self, state: State) -> None:
        """Keep the state at the end of a step, unless one that serves as well is there."""
        if not 0 < state.step <= len(self.keys):
            return
        key, entries = self.keys[state.step - 1], state.memory["entries"]
        held = self.states.load(key, self.first)
        if held is not None and int(held["entries"].item()) >= len(entries):
            return
        assert state.x0_hat is not None
        arrays = {"x": state.x, "x0_hat": state.x0_hat}
        arrays |= {f"{name}.{j}": getattr(entry, name) for j, entry in enumerate(entries) for name in FIELDS}
        plain = {name: value.cpu().numpy() for name, value in arrays.items()}
        spent = {"nfe": np.array([self.counted.rows // len(state.x)])}
        if self.counted.work != self.counted.rows:  # blocks were left out
            spent["work"] = np.array([self.counted.work / len(state.x)])
        self.states.save(key, self.first, plain | {"entries": np.array([len(entries)])} | spent)
