"""Schedules on other processes, at other costs, in weights: exact where nothing changes, at the cost asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import integrator
from tasks.adapt import moved, possible, resampled, weighted
from tasks.integrator import Plan
from tasks.processes import EDM, VP, Flow
from tasks.recipe import Recipe
from tasks.schedule import SolverSchedule, Step
from tasks.types import State

STEPS = st.builds(
    lambda order, prediction, corrector, kappa: Step(
        order, prediction, "u" if prediction == "v" else "lam", corrector=corrector if kappa == 0 else "none",
        kappa=0.0 if prediction == "v" else kappa,
    ),
    st.integers(1, 3), st.sampled_from(["x0", "eps", "v"]), st.sampled_from(["none", "pseudo", "implicit"]),
    st.sampled_from([0.0, 0.5]),
)  # fmt: skip
GRID = (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)


def schedule(preset: str, model: str = "digits", nfe: int = 6) -> tuple[Any, Any]:
    base = Recipe(model, "ddim", "uniform", "none", "single").completed()  # type: ignore[arg-type]
    found = base.override({"solver": {"name": "unified", "preset": preset}, "nfe": nfe})
    process = found.parts.model.noising
    return found.parts.solver.schedule(process, found.grid[0]), process


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=5, max_size=5), st.sampled_from([VP(), Flow()]))
def test_whatever_is_wanted_something_possible_is_made(steps: list[Step], process: Any) -> None:
    made = possible(process, GRID, steps)
    Plan(process, made)  # all its numbers are finite
    assert [s.prediction for s in made.steps] == [s.prediction for s in steps]
    assert all(a.order <= b.order for a, b in zip(made.steps, steps, strict=True))


@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc", "dpmpp_3m", "velocity_2m"])
@pytest.mark.parametrize("model", ["digits", "digits_flow"])
def test_a_schedule_that_runs_stays_as_it_is(preset: str, model: str) -> None:
    found, process = schedule(preset, model)
    assert possible(process, found.times, found.steps).steps == found.steps
    assert moved(found, process, process) is found
    assert resampled(found, found.nfe, process) is found


def test_a_moved_schedule_has_the_same_noise_levels() -> None:
    found, source = schedule("dpmpp_2m")
    target = Flow()
    there = moved(found, source, target)
    for t, s in zip(found.times[1:-1], there.times[1:-1], strict=True):
        assert target.lam(s) == pytest.approx(source.lam(t), abs=1e-6)
    assert (there.times[0], there.times[-1]) == (1.0, 0.0) and there.nfe == found.nfe


def test_ddim_on_a_moved_grid_takes_the_same_steps_in_scaled_coordinates() -> None:
    # Processes with equal log-SNR differ by a scale of x alone, which DDIM's step respects.
    found, source = schedule("ddim")
    target = Flow()
    plans = Plan(source, found), Plan(target, moved(found, source, target))
    for i in range(1, 5):
        ratios = []
        for plan, process in zip(plans, (source, target), strict=True):
            t, s = plan.times[i], plan.times[i + 1]
            ratios.append(
                (
                    plan.updates[i].carry * process.sigma(t) / process.sigma(s),
                    dict(plan.updates[i].weights)[0] / process.alpha(s),
                )
            )
        torch.testing.assert_close(torch.tensor(ratios[0]), torch.tensor(ratios[1]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc", "dpmpp_3m", "velocity_2m", "deis"])
@pytest.mark.parametrize("nfe", [2, 3, 4, 5, 8, 12])
def test_a_resampled_schedule_costs_what_was_asked_for(preset: str, nfe: int) -> None:
    found, process = schedule(preset)
    made = resampled(found, nfe, process)
    assert made.nfe == nfe
    Plan(process, made)


def test_resampling_a_uniform_grid_gives_the_uniform_grid() -> None:
    found, process = schedule("ddim", nfe=4)
    assert resampled(found, 8, process).times == pytest.approx([1 - i / 8 for i in range(9)])


def test_a_grid_beyond_the_targets_range_is_spread_within_it() -> None:
    found, source = schedule("dpmpp_2m", nfe=10)
    target = EDM(sigma_min=0.5, sigma_max=2.0)
    there = moved(found, source, target)
    assert all(a > b for a, b in zip(there.times, there.times[1:], strict=False))


# --- in weights ------------------------------------------------------------------------------------------------------


class Bent:
    """A network that is no function of its process."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.told: list[float] = []
        self._matrix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def denoise(self, x: torch.Tensor, t: float) -> torch.Tensor:
        self.told.append(t)
        return torch.tanh(x @ self._matrix + t)


def end_of(process: Any, made: SolverSchedule) -> tuple[torch.Tensor, list[float]]:
    """Where eight rows end, and the times that the network was told."""
    model, plan = Bent(process), Plan(process, made)
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = State(x, None, integrator.start(plan))
    for _ in made.steps:
        state = integrator.run_group(model, state, None)  # type: ignore[arg-type]
    return state.x, model.told


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("model", ["digits", "digits_flow"])
@pytest.mark.parametrize(
    "preset",
    ["ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpm_solver_2", "deis", "unipc", "unipc_bh1", "f_pndm", "velocity_2m"],
)
def test_any_explicit_solver_is_the_same_in_weights(preset: str, model: str, prediction: str) -> None:
    found, process = schedule(preset, model)
    made = weighted(process, found, prediction)
    assert all(step.weights and step.prediction == prediction for step in made.steps) and made.nfe == found.nfe
    (expected, times), (ends, told) = end_of(process, found), end_of(process, made)
    torch.testing.assert_close(ends, expected, rtol=1e-9, atol=1e-10)
    assert told == times
    if preset != "ddim":
        assert (ends - end_of(process, schedule("ddim", model)[0])[0]).abs().max() > 1e-3


def test_weights_keep_what_the_network_is_told() -> None:
    found, process = schedule("velocity_2m", "digits_flow")
    shifted = SolverSchedule(found.times, tuple(Step(1, "v", "u", time_shift=0.2) for _ in found.steps))
    (expected, times), (ends, told) = end_of(process, shifted), end_of(process, weighted(process, shifted, "v"))
    torch.testing.assert_close(ends, expected, rtol=1e-9, atol=1e-10)
    assert told == times and told[1] < found.times[1]


def test_what_is_not_explicit_is_refused_in_weights_and_weights_elsewhere() -> None:
    found, process = schedule("heun")
    with pytest.raises(ValueError, match="only a deterministic schedule that evaluates the network once a step"):
        weighted(process, found, "v")
    found, process = schedule("dpmpp_2m")
    made = weighted(process, found, "v")
    assert possible(process, made.times, made.steps).steps == made.steps and resampled(made, made.nfe, process) is made
    with pytest.raises(ValueError, match="free weights.*no form for another process"):
        moved(made, process, Flow())
    with pytest.raises(ValueError, match="free weights.*no form for another number of evaluations"):
        resampled(made, 4, process)
    for refused in (lambda: Plan(EDM(), made), lambda: weighted(EDM(), found, "v")):
        with pytest.raises(ValueError, match="prediction v needs a VP process or a flow, not EDM"):
            refused()
    found, process = schedule("dpmpp_2m", "digits_flow")
    with pytest.raises(ValueError, match="says nothing where alpha is 0.*Use v or x0"):
        weighted(process, found, "eps")
