"""Telling the network another time: what it is told, and what its answer means at the step's own time."""

import json

import pytest
import torch

from tasks.integrator import Plan, run_group, start
from tasks.noise import RowNoise
from tasks.processes import EDM, VP, Flow
from tasks.schedule import SolverSchedule, Step
from tasks.scheduler import UnifiedScheduler
from tasks.types import State

TIMES = (1.0, 0.7, 0.4, 0.15, 0.0)


class Constant:
    """A model whose velocity (noise, on a VE process) is the same everywhere, and which notes what it is told."""

    def __init__(self, process, value):
        self.process, self.value, self.told = process, value, []

    def denoise(self, x, t):
        self.told.append(t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if isinstance(self.process, Flow):
            return x - sigma * self.value
        if isinstance(self.process, VP):
            return alpha * x - sigma * self.value
        return x - sigma * self.value


def solved(process, shifts, value, x):
    steps = tuple(Step(1 if i == 0 else 2, variable="t", time_shift=s) for i, s in enumerate(shifts))
    plan = Plan(process, SolverSchedule(TIMES, (*steps[:-1], Step(1, time_shift=shifts[-1]))))
    model, noise = Constant(process, value), RowNoise(0, torch.arange(len(x)), dtype=torch.float64)
    state = State(x, None, start(plan), 0)
    for i in range(len(steps)):
        state = run_group(model, state, noise.at(i))
    return state.x, model.told


@pytest.mark.parametrize("process", [Flow(), VP(), EDM()], ids=["flow", "vp", "edm"])
def test_a_network_whose_velocity_never_changes_gives_the_same_samples_whatever_it_is_told(process):
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * process.sigma(1.0)
    value = torch.linspace(-1, 1, 3, dtype=torch.float64)
    plain, _ = solved(process, (0.0, 0.0, 0.0, 0.0), value, x)
    moved, _ = solved(process, (0.3, -0.2, 0.5, -0.4), value, x)
    torch.testing.assert_close(moved, plain, rtol=1e-9, atol=1e-9)


def test_the_network_is_told_a_time_further_on_or_back_and_never_beyond_the_noise():
    _, told = solved(Flow(), (-0.2, 0.5, -0.5, 0.1), 0.0, torch.zeros(1, 1, dtype=torch.float64))
    assert told == pytest.approx([1.0, 0.7 - 0.5 * 0.3, 0.4 + 0.5 * 0.25, 0.15 - 0.1 * 0.15])


class Gaussian:
    """N(0, c^2) on a flow: the exact denoiser."""

    process, c = Flow(), 0.5

    def denoise(self, x, t):
        return (1 - t) * self.c**2 / ((1 - t) ** 2 * self.c**2 + t**2) * x


def test_one_euler_step_from_a_well_chosen_time_lands_on_the_exact_solution():
    def variance(t):
        return (1 - t) ** 2 * Gaussian.c**2 + t**2

    t, s = 0.3, 0.05
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    exact = x * (variance(s) / variance(t)) ** 0.5  # the flow of a Gaussian keeps quantiles

    def error(shift):
        plan = Plan(Gaussian.process, SolverSchedule((t, s), (Step(1, "v", "u", time_shift=shift),)))
        noise = RowNoise(0, torch.arange(len(x)), dtype=torch.float64)
        return float((run_group(Gaussian(), State(x, None, start(plan), 0), noise).x - exact).abs().max())

    shifts = torch.linspace(0, 0.5, 101).tolist()
    best = min(shifts, key=error)
    assert 0.4 < best < 0.5 and error(best) < 0.02 * error(0.0)


@pytest.mark.parametrize("value", [-0.6, 0.51])
def test_a_shift_beyond_half_a_step_is_refused(value):
    with pytest.raises(ValueError, match="time_shift of a step must lie between -0.5 and 0.5"):
        Step(1, time_shift=value)


def test_a_stock_pipeline_cannot_tell_another_time():
    shifted = SolverSchedule((1.0, 0.5, 0.0), (Step(1, time_shift=0.1), Step(1)))
    with pytest.raises(ValueError, match="time_shift.*Set time_shift to 0"):
        UnifiedScheduler(schedule=json.loads(shifted.to_json()))
