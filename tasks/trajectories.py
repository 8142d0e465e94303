"""What calibrations of time grids share: reference trajectories on a fine grid, and one dynamic programme.

A cost matrix says what it costs to go from fine node i to fine node j in one step; the best N-step grid is then a
shortest path. The matrix is made once for all N.

Reference: Watson et al. 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models" (the dynamic
programme); Nguyen et al. 2023, "Bellman Optimal Stepsize Straightening of Flow-Matching Models"; Chen et al. 2024, "On
the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.processes import lam_range, transfer
from tasks.sampler import Sampler

# The many-step solution that errors are measured against. DPM-Solver++ 2M at 128 evaluations is nearer to Heun's at 511
# than Heun's own at 127 is: 6e-4 from it on the digits, 1.3e-3 on their flow (benchmarks/trajectory.py), and 4e-4 to
# 8e-4 on mixtures.
MANY_STEPS = 128
MANY_STEP_SOLVER = "dpmpp_2m"


@dataclass(frozen=True)
class Trajectories:
    """States and clean predictions at every node of a fine grid.

    Attributes:
        times: K + 1 times.
        x: states, (K + 1, B, *shape).
        x0: clean predictions at all nodes but the last, (K, B, *shape).
    """

    times: tuple[float, ...]
    x: Tensor
    x0: Tensor


def fine_grid(process: Any, num_steps: int, start: float = 1.0) -> tuple[float, ...]:
    """K + 1 times from ``start`` to 0: equal steps in time on a flow, in log-SNR elsewhere (with a last jump to 0)."""
    if process.kind_of_path == "linear":
        return tuple(start * (1.0 - i / num_steps) for i in range(num_steps)) + (0.0,)
    first, last = lam_range(process, start)
    lams = np.linspace(first, last, num_steps)
    return (start, *(process.time(float(lam)) for lam in lams[1:]), 0.0)


def reference(bench: Any, rows: int, times: tuple[float, ...], solver: Any) -> Sampler:
    """A sampler of reference trajectories that begin as the recipe's do.

    Grids are calibrated before initial states, so one that needs a calibration has it made here (from the data alone);
    one that is itself found along the grid begins at pure noise, and so does its reference.
    """
    from tasks import calibration
    from tasks.registry import initials

    initial = bench.parts.initial
    if calibration.needs_calibration(initial) and not hasattr(initial, "calibrated"):
        if "times" in initial.calibrated_on:
            initial = initials.build("prior")
        else:
            arrays = calibration._read(initial.artifact, {})[1] if initial.artifact else initial.calibrate(bench)
            initial = calibration._given(initial, arrays)
    return bench.sampler(rows, times=times, solver=solver, initial=initial)


def record(sampler: Sampler, noise: Any) -> Trajectories:
    """Run a sampler and keep every state and clean prediction."""
    state = sampler.start(noise)
    states, predictions = [state.x], []
    for _ in range(sampler.num_steps):
        state = sampler.step(state, noise)
        states.append(state.x)
        assert state.x0_hat is not None
        predictions.append(state.x0_hat)
    return Trajectories(sampler.times, torch.stack(states), torch.stack(predictions))


def jump_costs(process: Any, found: Trajectories, cost: str) -> np.ndarray:
    """What one first-order step from node i to node j > i costs, (K + 1, K + 1); infinite where j <= i.

    ``l2`` and ``l1`` are mean distances between where the step lands and where the trajectory was; ``dev`` compares how
    far both are from the straight line between the trajectory's ends.
    """
    count = len(found.times)
    costs = np.full((count, count), np.inf)
    flat = found.x.flatten(2).double()
    chord = flat[-1] - flat[0]
    unit = chord / chord.norm(dim=-1, keepdim=True)

    def deviation(x: Tensor) -> Tensor:
        offset = x - flat[0]
        return (offset - (offset * unit).sum(-1, keepdim=True) * unit).norm(dim=-1)

    for i in range(count - 1):
        for j in range(i + 1, count):
            landed = transfer(process, found.x[i], found.x0[i], found.times[i], found.times[j]).flatten(1).double()
            if cost == "dev":
                value = (deviation(landed) - deviation(flat[j])).abs().mean()
            elif cost == "l1":
                value = (landed - flat[j]).abs().mean()
            else:
                value = (landed - flat[j]).square().mean()
            costs[i, j] = float(value)
    return costs


def later_only(costs: np.ndarray) -> np.ndarray:
    """The costs with -1 where no step goes (j <= i), for a file; what else is not finite stays to be seen."""
    return np.where(np.triu(np.ones(costs.shape, dtype=bool), 1), costs, -1.0)


def shortest_path(costs: np.ndarray, num_steps: int, discount: float = 1.0) -> tuple[int, ...]:
    """Nodes 0 = i_0 < … < i_N = K of the path of exactly N steps that costs least.

    ``V[i, k] = min_j costs[i, j] + discount V[j, k - 1]``: a discount below 1 lets later steps count less, above 1
    more.

    Raises:
        ValueError: more steps than there are nodes.
    """
    last = len(costs) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(f"a grid of {num_steps} steps needs at least as many fine steps, got {last}. Raise num_fine.")
    value = np.full((num_steps + 1, last + 1), np.inf)
    choice = np.zeros((num_steps + 1, last + 1), dtype=np.int64)
    value[0, last] = 0.0
    for k in range(1, num_steps + 1):
        total = costs + discount * value[k - 1][None, :]
        choice[k] = total.argmin(axis=1)
        value[k] = total[np.arange(last + 1), choice[k]]
    nodes = [0]
    for k in range(num_steps, 0, -1):
        nodes.append(int(choice[k, nodes[-1]]))
    return tuple(nodes)
