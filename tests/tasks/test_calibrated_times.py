"""Grids found by looking at the model, the few-step grid of fixed numbers, and grids that travel back."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import calibration, registry
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.processes import VP
from tasks.recipe import Recipe, grid_of, segments
from tasks.run import generate
from tasks.sampler import CountedModel, Sampler
from tasks.trajectories import fine_grid, jump_costs, record, shortest_path

ONE_FOR_ALL = ["dp_steps", "gits", "ays"]  # one artifact for every number of steps
CALIBRATED = [*ONE_FOR_ALL, "optimal_steps"]


def path_cost(costs, nodes, discount=1.0):
    """What a path costs, added up step by step."""
    return float(sum(discount**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(nodes))))


def noise_of(rows=64):
    return RowNoise(0, torch.arange(rows), dtype=torch.float64)


def gmm(process="vp", **fields):
    return {"name": "gmm", "process": process} | fields


def recipe_of(model, times, solver="ddim", **fields):
    fields = {"guidance": "none", "batch_size": 64, "dtype": "float64"} | fields
    guidance = fields.pop("guidance")
    return Recipe(model, solver, times, guidance, "single", **fields).completed()


def grid_found(recipe):
    return grid_of(calibration.bound(recipe, calibration.make_all(recipe)))[0]


def arrays_of(recipe):
    return calibration.make_all(recipe)[recipe.calibrations[0].key]


def uniform(start, stop, num_steps):
    return tuple(float(t) for t in np.linspace(start, stop, num_steps + 1))


# --- the dynamic programme -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.data())
def test_the_dynamic_programme_finds_what_brute_force_finds(last, data):
    steps = data.draw(st.integers(1, last))
    discount = data.draw(st.sampled_from([1.0, 0.8, 1.15]))
    values = data.draw(st.lists(st.floats(0, 10), min_size=(last + 1) ** 2, max_size=(last + 1) ** 2))
    costs = np.where(np.triu(np.ones((last + 1, last + 1)), 1) > 0, np.reshape(values, (last + 1, -1)), np.inf)
    best = min(
        path_cost(costs, (0, *inner, last), discount) for inner in itertools.combinations(range(1, last), steps - 1)
    )
    nodes = shortest_path(costs, steps, discount)
    assert len(nodes) == steps + 1 and (nodes[0], nodes[-1]) == (0, last)
    assert all(a < b for a, b in zip(nodes, nodes[1:], strict=False))
    assert path_cost(costs, nodes, discount) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_the_cost_of_a_path_is_the_discounted_sum_of_its_steps():
    costs = np.arange(16.0).reshape(4, 4)
    assert path_cost(costs, (0, 1, 3)) == costs[0, 1] + costs[1, 3]
    assert path_cost(costs, (0, 1, 2, 3), 0.5) == costs[0, 1] + costs[1, 2] / 2 + costs[2, 3] / 4
    additive = np.where(np.triu(np.ones((6, 6)), 1) > 0, np.arange(6)[None] - np.arange(6)[:, None], np.inf)
    assert {path_cost(additive, shortest_path(additive, n)) for n in range(1, 6)} == {5.0}


@pytest.mark.parametrize("steps", [0, 4])
def test_more_steps_than_nodes_are_refused(steps):
    with pytest.raises(ValueError, match="needs at least as many fine steps, got 3. Raise num_fine"):
        shortest_path(np.full((4, 4), 1.0), steps)


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_fine_grids_fall_from_the_start_to_the_data(process):
    p = GMM(process=process).noising
    for start in (1.0, 0.6):
        grid = fine_grid(p, 20, start)
        assert len(grid) == 21 and (grid[0], grid[-1]) == (start, 0.0)
        assert all(a > b for a, b in zip(grid, grid[1:], strict=False))
    steps = np.diff(grid) if process == "flow" else np.diff([p.lam(t) for t in grid[:-1]])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_the_steps_of_the_reference_itself_cost_nothing():
    model = CountedModel(GMM(process="flow").load("cpu"), 10**6)
    grid = fine_grid(model.process, 12)
    found = record(Sampler(model, registry.solvers.build("euler"), grid), noise_of(16))
    assert found.x.shape == (13, 16, 2) and found.x0.shape == (12, 16, 2) and model.rows == 12 * 16
    for cost in ("l2", "l1", "dev"):
        costs = jump_costs(model.process, found, cost)
        assert np.isinf(costs[np.tril_indices(13)]).all() and (costs[np.triu_indices(13, 1)] >= 0).all()
        assert np.diag(costs, 1).max() < 1e-12
        assert path_cost(costs, shortest_path(costs, 12)) < 1e-12
    # One jump over everything lands on the first prediction.
    expected = float((found.x0[0] - found.x[-1]).square().mean())
    assert jump_costs(model.process, found, "l2")[0, 12] == pytest.approx(expected)


# --- grids from trajectories -----------------------------------------------------------------------------------------

WIDE = gmm("flow", means=(2 * np.random.default_rng(0).normal(size=(5, 16))).tolist(), covariances=[0.3] * 5)


@pytest.fixture(scope="module")
def wide():
    """Errors of Euler's method on a mixture in 16 dimensions against the end of a thousand steps."""
    model = registry.models.build(WIDE).load("cpu")
    end = Sampler(model, registry.solvers.build("heun"), uniform(1.0, 0.0, 600)).run(noise_of(256)).x

    def error(grid):
        found = Sampler(model, registry.solvers.build("euler"), tuple(grid)).run(noise_of(256)).x
        return float((found - end).norm(dim=1).square().mean().sqrt())

    return error


@pytest.mark.parametrize("steps", [4, 6, 8, 10])
def test_bellman_optimal_steps_beat_equal_ones_for_euler_on_a_flow(wide, steps):
    # Notes: 1.69 1.27 1.06 .92 -> 1.63 1.16 .99 .84 on a mixture of theirs; here 3.33 2.70 2.16 1.90 -> 2.54 1.92 1.66
    # 1.51.
    best = wide(grid_found(recipe_of(WIDE, {"name": "dp_steps", "num_steps": steps})))
    assert best < 0.85 * wide(uniform(1.0, 0.0, steps))


def test_gits_runs_and_its_discount_decides_what_it_is_worth(wide):
    grids = {
        gamma: grid_found(recipe_of(WIDE, {"name": "gits", "num_steps": 8, "gamma": gamma}))
        for gamma in (0.8, 0.9, 1.15)
    }
    assert len(set(grids.values())) == 3
    # Above 1 later steps count more, so more of them lie late; 1.15 has to be tuned (2.10), .9 is better (1.50).
    assert grids[0.8][4] > grids[1.15][4]
    assert wide(grids[0.9]) < 0.8 * wide(grids[1.15])
    for cost in ("l1", "l2"):
        assert wide(grid_found(recipe_of(WIDE, {"name": "gits", "num_steps": 8, "cost": cost}))) < wide(
            uniform(1.0, 0.0, 8)
        )


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_calibrated_grids_fall_from_one_to_zero_for_every_number_of_steps(name, process):
    recipe = recipe_of(gmm(process), {"name": name, "num_steps": 3})
    for steps in (1, 2, 5, 30):
        other = recipe.override({"times.num_steps": steps})
        other.check()
        grid = grid_found(other)
        assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (1.0, 0.0)
        assert all(a > b for a, b in zip(grid, grid[1:], strict=False))


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_one_artifact_serves_every_number_of_steps(name):
    recipe = recipe_of(gmm(labels=True), {"name": name}, guidance={"name": "cfg", "scale": 2.0})
    keys = {
        recipe.override(c).calibrations[0].key for c in ({}, {"nfe": 4}, {"times.num_steps": 7}, {"solver": "heun"})
    }
    assert len(keys) == 1
    assert len({recipe.override({"times.num_steps": n}).key for n in (4, 5, 6)}) == 3
    assert recipe.override({"guidance.scale": 3.0}).calibrations[0].key not in keys
    assert recipe.override({"initial": {"name": "teleport"}}).calibrations[0].key not in keys


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_recipe_with_a_calibrated_grid_makes_its_rows_and_counts_them(name):
    recipe = recipe_of(gmm(), {"name": name, "num_steps": 4}, "dpmpp_2m")
    recipe.check()
    rows = generate(recipe, 0, 40)
    assert (rows["nfe"] == recipe.nfe).all() and recipe.nfe == 4
    explicit = recipe.override({"times": {"name": "explicit", "values": list(grid_found(recipe))}})
    np.testing.assert_array_equal(generate(explicit, 0, 40)["x0"], rows["x0"])


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_the_calibration_costs_its_levels_times_its_samples(name):
    recipe = recipe_of(gmm(), {"name": name, "num_samples": 10})
    _, cost = calibration.make(recipe, recipe.calibrations[0], recipe.parts)
    assert cost["nfe"] == 10 * {"dp_steps": 100, "gits": 60, "ays": 64}[name]


def test_a_calibrated_grid_begins_where_the_initial_state_does():
    initial = {"name": "teleport", "rho": 10.0}
    for name in CALIBRATED:
        recipe = recipe_of(gmm("edm"), {"name": name, "num_steps": 5}, initial=initial)
        recipe.check()
        assert grid_found(recipe)[0] == pytest.approx(0.125, rel=1e-12)
        assert np.isfinite(generate(recipe, 0, 8)["x0"]).all()


# --- Align Your Steps ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bound_of():
    """The bound of a Gaussian of variance 1/4 between sigma = 80 and 0.02, on a lattice."""
    spec = gmm("edm", means=[[0.0]], covariances=[0.5])
    # 180 of 230 equal steps in log sigma from 80 to 0.002 end at 0.02.
    found = arrays_of(recipe_of(spec, {"name": "ays", "num_levels": 231, "num_samples": 4000}))
    sigma = 80 * found["times"][:181]
    assert sigma[-1] == pytest.approx(0.02, rel=2e-3)
    return sigma, np.where(found["costs"] < 0, np.inf, found["costs"])[:181, :181]


@pytest.mark.parametrize(("steps", "edm", "log_uniform", "optimum"), [(5, 70.5, 15.9, 3.34), (10, 9.78, 3.97, 1.30)])
def test_the_bound_of_a_gaussian_is_the_published_one(bound_of, steps, edm, log_uniform, optimum):
    sigma, costs = bound_of

    def cost(levels):
        nodes = [int(np.abs(np.log(sigma / s)).argmin()) for s in levels]
        return path_cost(costs, tuple(nodes))

    ramp = np.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), steps + 1) ** 7
    # Levels are rounded to the lattice (a step of 4.6 % in sigma), the expectation is over 4000 draws (2 %).
    assert cost(ramp) == pytest.approx(edm, rel=0.1)
    assert cost(np.geomspace(80, 0.02, steps + 1)) == pytest.approx(log_uniform, rel=0.08)
    # The notes have 3.34 and, from a search node by node, 1.46; the shortest path over the closed form costs 1.30.
    best = path_cost(costs, shortest_path(costs, steps))
    assert best == pytest.approx(optimum, rel=0.08)


def test_every_interval_of_the_bound_is_the_closed_form(bound_of):
    sigma, costs = bound_of
    v = 0.25

    def primitive(s):  # of s^-3 v^2 / (v + s^2)
        return -v / (2 * s**2) - np.log(s) + 0.5 * np.log(v + s**2)

    for i, j in ((0, 180), (20, 100), (60, 61), (100, 150), (150, 180)):
        a, b = sigma[i], sigma[j]
        exact = primitive(a) - primitive(b) - v**2 / (v + a**2) * 0.5 * (1 / b**2 - 1 / a**2)
        # One shared set of 4000 noised data.
        assert costs[i, j] == pytest.approx(exact, rel=0.08)


# --- the few-step grid -----------------------------------------------------------------------------------------------

SD = VP("scaled_linear", 0.00085, 0.012)
PRINTED = [
    (dict(num_steps=8, num_nodes=12, rho=7.0, stop_node=9),
     [999, 857.3, 719.4, 585.9, 457.2, 334.3, 218.7, 112.7, 22.7],
     [14.615, 6.712, 3.608, 2.172, 1.404, 0.937, 0.617, 0.373, 0.147]),
    (dict(num_steps=5, num_nodes=8, rho=5.0, stop_node=6),
     [999, 772.5, 556.7, 354.2, 170, 18.3], [14.615, 4.519, 1.962, 1.001, 0.502, 0.132]),
    (dict(num_steps=6, num_nodes=8, rho=5.0, stop_node=6), [999, 809.6, 627.3, 453.5, 290.4, 141.7, 18.3], None),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "steps", "sigmas"), PRINTED, ids=["8", "5", "6"])
def test_the_few_step_grid_is_every_printed_digit_of_the_published_lists(fields, steps, sigmas):
    grid = registry.times.build({"name": "few_step"} | fields)(SD)
    assert [round(SD.model_time(t), 1) for t in grid] == pytest.approx(steps, abs=1e-9)
    if sigmas is not None:
        # The list has .502 where log-linear interpolation gives .5015.
        assert [SD.sigma(t) / SD.alpha(t) for t in grid] == pytest.approx(sigmas, abs=5.1e-4)


def test_the_few_step_grid_stops_above_the_data_unless_it_is_told_to_finish():
    few = {"name": "few_step", "num_steps": 6}
    recipe = recipe_of(gmm(), few, "dpmpp_2m")
    recipe.check()
    assert recipe.grid[0][-1] > 0 and recipe.nfe == 6
    finished = recipe.override({"times.finish": True})
    assert finished.grid[0] == (*recipe.grid[0], 0.0) and finished.nfe == 7
    assert (generate(recipe, 0, 4)["nfe"] == 6).all()


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_few_step_grids_fall_on_every_process(process):
    for n in range(1, 12):
        grid = registry.times.build({"name": "few_step", "num_steps": n})(GMM(process=process).noising)
        assert len(grid) == n + 1 and all(a > b > 0 for a, b in zip(grid, grid[1:], strict=False))


# --- travel ----------------------------------------------------------------------------------------------------------


def travel(base, **fields):
    return {"name": "travel", "base": base} | fields


TEN = {"name": "uniform", "num_steps": 10}
PATHS = [
    (dict(length=2, repeats=2), 4, (0, 1, 2, 0, 1, 2, 3, 2, 3, 4)),
    (dict(length=1, repeats=3), 3, (0, 1, 0, 1, 0, 1, 2, 1, 2, 1, 2, 3)),
    (dict(length=3, repeats=2), 7, (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7)),
    (dict(length=2, repeats=2, first=2, last=4), 6, (0, 1, 2, 3, 4, 2, 3, 4, 5, 6)),
    (dict(length=5, repeats=2), 3, (0, 1, 2, 0, 1, 2, 3)),
    (dict(length=2, repeats=1), 4, (0, 1, 2, 3, 4)),
    (dict(length=2, repeats=2, first=9), 4, (0, 1, 2, 3, 4)),
    (dict(length=2, repeats=2), 1, (0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "steps", "path"), PATHS)
def test_the_walk_visits_these_nodes(fields, steps, path):
    grid = registry.times.build(travel({"name": "uniform", "num_steps": steps}, **fields))
    assert grid.path == path and grid.num_steps == len(path) - 1
    nodes = uniform(1.0, 0.0, steps)
    assert grid(GMM().noising) == pytest.approx([nodes[i] for i in path])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 13), st.integers(0, 13) | st.none())
def test_every_walk_ends_at_the_data_and_never_leaves_them(steps, length, repeats, first, last):
    grid = registry.times.build(
        travel({"name": "uniform", "num_steps": steps}, length=length, repeats=repeats, first=first, last=last)
    )
    path = grid.path
    assert path[0] == 0 and path[-1] == steps and path.count(steps) == 1
    assert all(b == a + 1 or (b < a and a - b <= length) for a, b in zip(path, path[1:], strict=False))
    assert set(path) == set(range(steps + 1))


@pytest.mark.parametrize(
    "solver",
    ["ddim", {"name": "ddim", "eta": 1.0}, "heun", "dpmpp_2m", {"name": "unified", "preset": "unipc"}, "ghvb"],
    ids=str,
)
def test_one_walk_over_each_stretch_is_the_base_grid_bit_for_bit(solver):
    plain = recipe_of(gmm(), TEN, solver)
    walked = plain.override({"times": travel(TEN, repeats=1)})
    walked.check()
    assert walked.key == plain.key  # equal times, equal rows
    np.testing.assert_array_equal(generate(walked, 0, 20)["x0"], generate(plain, 0, 20)["x0"])


@pytest.mark.parametrize(
    "solver",
    ["ddim", "heun", "dpmpp_2m", {"name": "unified", "preset": "unipc"}, {"name": "unified", "preset": "heun"},
     {"name": "unified", "preset": "dpmpp_2s"}, "ghvb", {"name": "unified", "preset": "dpmpp_2m_sde"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_the_evaluations_of_a_walk_are_counted(solver, process):
    recipe = recipe_of(gmm(process), travel(TEN, length=3, repeats=2), solver)
    recipe.check()
    rows = generate(recipe, 0, 8)
    assert (rows["nfe"] == recipe.nfe).all() and np.isfinite(rows["x0"]).all()
    assert recipe.nfe > recipe.override({"times": TEN}).nfe
    if solver == "ddim":
        steps_down = sum(b - a for a, b in segments(recipe.grid[0]))
        assert recipe.nfe == steps_down == 10 + 3 + 3 + 3


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_going_back_is_the_forward_kernel(process):
    model = GMM(process=process).load("cpu")
    p, rows = model.process, 20_000
    grid = (0.8, 0.5, 0.8, 0.3, 0.0)
    sampler = Sampler(model, registry.solvers.build("ddim"), grid)
    noise = noise_of(rows)
    state = sampler.step(sampler.start(noise), noise)
    back = sampler.step(state, noise)
    ratio = p.alpha(0.8) / p.alpha(0.5)
    std = math.sqrt(p.sigma(0.8) ** 2 - (ratio * p.sigma(0.5)) ** 2)
    z = (back.x - ratio * state.x) / std
    # Standard normal, and nothing to do with the state it was added to or with the prior.
    for value in (z, z * state.x / state.x.std(), z * sampler.start(noise).x / p.prior_std(0.8)):
        assert abs(float(value.mean())) < 5 * float(value.std()) / math.sqrt(value.numel())
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / z.numel())
    assert back.step == 2
    # Every jump has noise of its own.
    again = sampler.step(type(back)(state.x, state.x0_hat, state.memory, 1), noise.at(7))
    assert torch.equal(again.x, back.x)  # keyed by the step, not by what else was drawn


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", {"name": "unified", "preset": "dpmpp_2m_sde"}], ids=str)
def test_travelling_keeps_the_marginals_of_gaussian_data(process, solver):
    spec, rows = gmm(process, means=[[0.6]], covariances=[0.5]), 20_000
    base = {"name": "logsnr", "num_steps": 60}
    recipe = recipe_of(spec, travel(base, length=10, repeats=2), solver, batch_size=20_000)
    x = generate(recipe, 0, rows)["x0"]
    assert abs(x.mean() - 0.6) < 5 * 0.5 / math.sqrt(rows) + 0.005
    # Sixty second-order steps leave one percent.
    assert abs(x.var() / 0.25 - 1) < 5 * math.sqrt(2 / rows) + 0.015


def test_a_multistep_solver_starts_afresh_after_a_jump():
    model = GMM().load("cpu")
    noise, solver = noise_of(4), registry.solvers.build({"name": "unified", "preset": "dpmpp_2m"})
    grid = (1.0, 0.7, 0.4, 0.7, 0.4, 0.0)
    sampler = Sampler(model, solver, grid)
    state = sampler.start(noise)
    for _ in range(3):
        state = sampler.step(state, noise)
    alone = Sampler(model, solver, grid[3:])
    begun = type(state)(state.x, None, alone.solver.start(model.process, grid[3:]), 0)
    torch.testing.assert_close(sampler.step(state, noise).x, alone.step(begun, noise).x, rtol=1e-12, atol=1e-12)


def test_walks_are_refused_where_the_solver_lays_its_own_course():
    with pytest.raises(ValueError, match="lays its own course|takes no explicit times"):
        recipe_of(gmm(), travel(TEN), {"name": "diffusers"}).check()


@pytest.mark.parametrize(
    "fields",
    [{"length": 0}, {"repeats": 0}, {"first": -1}, {"base": {"name": "stock"}}, {"base": {"name": "dp_steps"}},
     {"base": {"name": "travel"}}],
    ids=str,
)  # fmt: skip
def test_walks_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValueError, match="travel needs|must be a grid of its own"):
        registry.times.build({"name": "travel"} | fields)


@pytest.mark.parametrize(
    "spec",
    [{"name": "dp_steps", "num_steps": 0}, {"name": "dp_steps", "num_steps": 101}, {"name": "gits", "gamma": 0.0},
     {"name": "gits", "cost": "l3"}, {"name": "gits", "num_steps": 61}, {"name": "ays", "num_steps": 64},
     {"name": "ays", "num_samples": 0}, {"name": "few_step", "stop_node": 12}, {"name": "few_step", "rho": 0.0}],
    ids=str,
)  # fmt: skip
def test_wrong_fields_are_refused(spec):
    with pytest.raises(ValueError, match=f"{spec['name']} needs|unknown cost"):
        registry.times.build(spec)
