"""Trajectory errors: against the exact flow of a Gaussian, their order, their influence, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.metrics.trajectory import Trajectory
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate, load_model, score
from tasks.sampler import Sampler

VALUE, COLUMN, ROWS = "quality/trajectory_error", "trajectory_distance", 64
KARRAS = {"name": "karras"}
GAUSSIAN = {"name": "gmm", "means": [[0.6, -0.3, 1.0]], "covariances": [[0.09, 0.5, 1.4]]}


def recipe(model="gmm", solver="ddim", times="uniform", steps=None, **more):
    made = Recipe(model, solver, times, "none", "single", batch_size=32, dtype="float64", **more).completed()
    return made if steps is None else made.override({"times.num_steps": steps})


def error(of, **fields):
    """The metric of the rows [0, ROWS) of a recipe, and its influences."""
    metric = registry.metrics.build({"name": "trajectory", **fields})
    (need,) = metric.needs()
    mine, other = generate(of, 0, ROWS), generate(of.companion(need), 0, ROWS)
    column = score(need, mine["x0"], mine["label"], 0, of.batch_size, "cpu", other["x0"])
    rows = {COLUMN: column}
    summary = metric.summarize(rows)
    return metric.compute(summary, None)[VALUE], metric.influence(summary, None, rows)[VALUE]


def exact_error(of):
    """Distance to the closed-form flow of a Gaussian from the same starting noise."""
    model = load_model(of)
    noise = RowNoise(of.seed, torch.arange(ROWS), dtype=torch.float64)
    begin = Sampler(model, of.parts.solver, of.grid[0], initial=of.parts.initial).start(noise).x
    end = model.flow_map(begin, of.grid[0][0], 0.0)
    return float((torch.from_numpy(generate(of, 0, ROWS)["x0"]) - end).square().mean().sqrt())


# --- against exact answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [5, 8])
def test_the_error_is_the_distance_to_the_exact_flow(process, steps):
    grid = "uniform" if process == "flow" else "karras"
    of = recipe(GAUSSIAN | {"process": process}, "dpmpp_2m", grid, steps)
    (need,) = registry.metrics.build("trajectory").needs()
    floor = exact_error(of.companion(need))
    exact = exact_error(of)
    # The triangle inequality: the many-step solution is itself a little off the flow, and that is all.
    assert floor < 0.06 * exact
    assert abs(error(of)[0] - exact) <= floor * 1.0001


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_errors_fall_with_the_solvers_order(solver, order):
    # On one grid family, so that the last step to the data is the same in all and in the many-step solution.
    counts = np.array([16, 32, 64])
    fine = {"solver": {"name": "heun"}, "num_steps": 1024}
    errors = [error(recipe(GAUSSIAN, solver, "logsnr", int(n)), **fine)[0] for n in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.2)
    if solver == "ddim":
        assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2.0, 2.0], abs=0.15)


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_twice_the_steps_move_the_many_step_solution_by_less_than_a_tenth_of_the_errors_it_measures(process):
    of = recipe({"name": "gmm", "process": process}, "dpmpp_2m", "uniform" if process == "flow" else "logsnr", 8)
    metric = registry.metrics.build("trajectory")
    (need,) = metric.needs()
    assert error(of.companion(need), num_steps=2 * metric.num_steps)[0] < 0.1 * error(of)[0]


@pytest.mark.parametrize("fields", [{}, {"solver": {"name": "heun"}, "num_steps": 9, "times": {"name": "karras"}}])
def test_the_many_step_solution_has_no_error(fields):
    metric = registry.metrics.build({"name": "trajectory", **fields})
    itself = recipe().companion(metric.needs()[0])
    value, influence = error(itself, **fields)
    assert value == 0.0 and np.array_equal(influence, np.zeros(ROWS))


STOCK = {"timestep_spacing": "trailing", "clip_sample": False}


def test_a_stock_scheduler_is_measured_along_its_own_grid():
    stock = {"name": "diffusers", "scheduler": "DDIMScheduler", "config": STOCK}
    of = recipe(GAUSSIAN, stock, {"name": "stock", "num_steps": 8})
    ours = recipe(GAUSSIAN, "ddim", "uniform", 8)
    assert error(of)[0] == pytest.approx(error(ours)[0], rel=0.05)


# --- the interval ----------------------------------------------------------------------------------------------------


def test_an_influence_is_the_finite_difference_in_a_rows_weight():
    distances = np.random.default_rng(3).exponential(0.2, (40, 1))
    metric, rows = Trajectory(), {COLUMN: distances}
    influence = metric.influence(metric.summarize(rows), None, rows)[VALUE]

    def weighted(row, weight):
        weights = np.ones(40)
        weights[row] += weight
        return math.sqrt((weights @ distances[:, 0] ** 2) / weights.sum())

    step = 1e-5
    moved = [(weighted(i, step) - weighted(i, -step)) / (2 * step) * 40 for i in range(40)]
    np.testing.assert_allclose(influence, moved, rtol=1e-6, atol=1e-9)


def test_the_standard_error_is_the_spread_of_repeated_draws():
    rng, metric, count = np.random.default_rng(5), Trajectory(), 200
    values, errors = [], []
    for _ in range(400):
        rows = {COLUMN: rng.exponential(0.2, (count, 1))}
        summary = metric.summarize(rows)
        values.append(metric.compute(summary, None)[VALUE])
        errors.append(metric.influence(summary, None, rows)[VALUE].std() / math.sqrt(count))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=5 / math.sqrt(2 * 400))


# --- the companion recipe --------------------------------------------------------------------------------------------


def test_the_companion_differs_in_solver_and_times_alone():
    of = recipe({"name": "gmm", "labels": True}, "heun", "karras", 5, labels=1, seed=9, reward={"name": "ink"})
    of = of.override({"guidance": {"name": "cfg", "scale": 2.0}})
    other = of.companion(registry.features.complete(COLUMN))
    assert (other.solver["name"], other.times) == ("dpmpp_2m", {"name": "logsnr", "num_steps": 128})
    assert other == of.override({"solver": other.solver, "times": other.times, "reward": None})
    flow = recipe({"name": "gmm", "process": "flow"}).companion(registry.features.complete(COLUMN))
    assert flow.times == {"name": "uniform", "num_steps": 128}


def test_all_solvers_and_grids_of_a_model_share_one_companion_and_other_seeds_do_not():
    need = registry.features.complete(COLUMN)
    same = [recipe(solver=s, times=t, steps=n) for s in ("ddim", "heun") for t in ("uniform", "karras") for n in (3, 6)]
    assert len({r.companion(need).key for r in same}) == 1
    assert len({r.column_key(need) for r in same}) == 8
    assert recipe(seed=1).companion(need).key != recipe().companion(need).key


def test_another_many_step_solution_is_another_column():
    keys = {recipe().column_key(Trajectory(num_steps=n, times=t).needs()[0]) for n in (64, 128) for t in (None, KARRAS)}
    assert len(keys) == 4
    assert len({recipe().column_key({"name": "identity"}), recipe().column_key({"name": "identity"})}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": {"name": "ddim", "eta": 0.5}}, "solver ddim draws noise on the way. Use another solver"),
        ({"solver": "flow_sde"}, "solver flow_sde draws noise"),
        ({"times": {"name": "travel"}}, "times travel noise the state again"),
        ({"initial": "teleport"}, "initial teleport begins elsewhere. Use initial=prior"),
        ({"initial": "shared_noise"}, "initial shared_noise begins elsewhere"),
        ({"strategy": "best_of_n", "reward": "ink"}, "strategy best_of_n chooses. Use strategy=single"),
        ({"model": "table", "solver": "ancestral"}, "model table is masked and follows no ODE. Use another model"),
    ],
)
def test_what_leaves_its_trajectory_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"same starting noise, but {message}"):
        recipe().override(changes).companion(registry.features.complete(COLUMN))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"solver": {"name": "ddim", "eta": 1.0}}, "solver ddim draws some"),
        ({"solver": {"name": "huen"}}, "did you mean 'heun'"),
        ({"times": {"name": "travel"}}, "times travel rise"),
        ({"times": {"name": "karras", "roh": 5}}, "did you mean 'rho'"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_an_impossible_many_step_solution_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.metrics.build({"name": "trajectory", **fields})


def test_a_many_step_solution_that_must_be_calibrated_is_refused():
    need = Trajectory(times={"name": "dp_steps"}, num_steps=8).needs()[0]
    with pytest.raises(ValueError, match="need no calibration, got dpmpp_2m and dp_steps"):
        recipe().companion(need)


@pytest.mark.parametrize("companion", [None, np.zeros((3, 2))])
def test_samples_without_their_companions_are_not_scored(companion):
    with pytest.raises(ValueError, match=r"compares every sample with its companion's, \(4, 2\)"):
        score({"name": COLUMN}, np.zeros((4, 2)), np.zeros(4), 0, 4, "cpu", companion)
