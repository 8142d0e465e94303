"""Initial states: what they are exact for, what they cost, and where a run goes on from them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import calibration, registry
from tasks.calibration import Bench
from tasks.noise import RowNoise
from tasks.recipe import Recipe, grid_of
from tasks.run import generate
from tasks.sampler import CountedModel, Sampler
from tasks.statistics import flow, gaussian_statistics, pick

TOY = {"weights": [0.3, 0.7], "means": [[-1.0], [0.8]], "covariances": [0.4, 0.5]}
GAUSSIAN = {"means": [[0.6, -0.3, 0.1]], "covariances": [[[0.3, 0.1, 0.0], [0.1, 0.2, 0.05], [0.0, 0.05, 0.1]]]}
DIGITS = {"name": "gmm", "fit": "digits"}


def noise_of(rows, seed=0):
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def gmm(process="vp", **fields):
    return {"name": "gmm", "process": process} | fields


def recipe_of(model, initial, times="logsnr", solver="ddim", **fields):
    times = {"name": times, "num_steps": 8} if isinstance(times, str) else times
    fields = {"guidance": "none", "batch_size": 64, "dtype": "float64"} | fields
    guidance = fields.pop("guidance")
    return Recipe(model, solver, times, guidance, "single", initial=initial, **fields).completed()


def sampler_of(recipe, cond=None):
    """The recipe's sampler with its artifacts, on a counted model."""
    parts = calibration.bound(recipe, calibration.make_all(recipe))
    model = parts.guidance.wrap(CountedModel(parts.model.load("cpu"), 10**6))
    return Sampler(model, parts.solver, grid_of(parts)[0], cond, None, parts.initial)


def exact_flow(model, x, start, stop):
    """The end of the probability-flow ODE from x, by DOP853 on the exact score."""
    p = model.process

    def slope(u, y):
        y = torch.from_numpy(y).view(x.shape)
        if p.kind_of_path == "linear":
            return ((y - model.denoise(y, u)) / u).flatten().numpy()
        t = p.time(-math.log(u))
        alpha, sigma = p.alpha(t), p.sigma(t)
        return ((alpha * y - alpha * model.denoise(alpha * y, t)) / sigma).flatten().numpy()

    (scale, first), (end_scale, last) = p.ode(start), p.ode(stop)
    run = solve_ivp(slope, (first, last), (x / scale).flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return end_scale * torch.from_numpy(run.y[:, -1]).view(x.shape)


def rms(a, b):
    return float((a - b).square().mean().sqrt())


# --- teleport --------------------------------------------------------------------------------------------------------


def moments_as_statistics(spec):
    """The statistics that endless data would give."""
    mean, covariance = registry.models.build(spec).moments()
    values, vectors = np.linalg.eigh(covariance)
    return {"mean": mean[None], "vectors": vectors[None], "values": values[None], "tail": np.zeros(1)}


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
@pytest.mark.parametrize("rho", [30.0, 5.0, 1.0, 0.2])
def test_the_closed_form_is_the_ode_of_gaussian_data_at_any_skip(process, rho):
    spec = gmm(process, **GAUSSIAN)
    model = registry.models.build(spec).load("cpu")
    p = model.process
    x, stop = p.prior((3,), noise_of(8).at(-1), 1.0), p.time(-math.log(rho))
    landed = flow(p, x, 1.0, stop, pick(moments_as_statistics(spec), None, x))
    torch.testing.assert_close(landed, exact_flow(model, x, 1.0, stop), rtol=0, atol=1e-9)


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_teleporting_gaussian_data_is_exact_up_to_the_statistics_of_the_sample(process):
    spec = gmm(process, **GAUSSIAN)
    sampler = sampler_of(recipe_of(spec, {"name": "teleport", "rho": 0.5, "num_data": 40_000}))
    model = registry.models.build(spec).load("cpu")
    x = model.process.prior((3,), noise_of(64).at(-1), 1.0)
    landed, exact = sampler.start(noise_of(64)).x, exact_flow(model, x, 1.0, sampler.times[0])
    # Means and deviations of 40000 data have relative errors of 1 / sqrt(40000) and less.
    assert rms(landed, exact) < 5 * 0.6 / math.sqrt(40_000)
    assert sampler.model.rows == 0


def test_the_error_on_a_mixture_by_level_is_the_published_table():
    model = registry.models.build(gmm("edm", **TOY)).load("cpu")
    p, x, stop = model.process, 80.0 * noise_of(1000).at(-1).normal((1,), "prior"), 0.0005
    chosen = pick(moments_as_statistics(gmm("edm", **TOY)), None, x)
    end = exact_flow(model, x, 1.0, stop)
    found = []
    for rho in (25.0, 11.8, 6.1, 3.4, 2.0):
        landed = flow(p, x, 1.0, rho / 80, chosen)
        found.append(rms(exact_flow(model, landed, rho / 80, stop), end))
    # Notes: 1e-5, 5e-5, 3.4e-4, 1.7e-3, 6.6e-3; ours 4e-6, 4e-5, 2.8e-4, 1.5e-3, 6.4e-3.
    assert found[1:] == pytest.approx([5e-5, 3.4e-4, 1.7e-3, 6.6e-3], rel=0.3)
    assert found[0] < 1e-5 and found == sorted(found)


def test_fewer_directions_than_dimensions_share_the_mean_of_the_rest():
    rng = np.random.default_rng(0)
    scales = np.array([2.0, 1.0, 0.5, 0.4, 0.1])
    data = torch.from_numpy(rng.normal(size=(5000, 5)) * scales)
    full, some = (gaussian_statistics(data, None, 0, rank) for rank in (None, 2))
    np.testing.assert_allclose(some["values"], full["values"][:, :2], rtol=1e-12)
    assert some["tail"] == pytest.approx(full["values"][0, 2:].mean())
    # A direction inside moves by its own variance, one outside by the tail's.
    p = registry.models.build(gmm("edm")).noising
    for k, variance in ((0, full["values"][0, 0]), (4, float(some["tail"][0]))):
        step = torch.from_numpy(full["vectors"][:, :, k])
        at_mean, moved = (
            flow(p, torch.from_numpy(some["mean"]) + c * step, 1.0, 0.01, pick(some, None, step)) for c in (0.0, 1.0)
        )
        gain = math.sqrt((variance + 0.8**2) / (variance + 80**2))
        torch.testing.assert_close(moved - at_mean, gain * step, rtol=0, atol=2e-4)


def test_more_dimensions_than_data_are_no_trouble():
    data = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 9)))
    for rank in (None, 2, 6):
        found = gaussian_statistics(data, None, 0, rank)
        kept = 9 if rank is None else rank
        assert found["vectors"].shape == (1, 9, kept) and found["values"].shape == (1, kept)
        assert (found["values"][0, 3:] < 1e-20).all()  # four points span three directions
    full = gaussian_statistics(data, None, 0, None)["vectors"][0]
    np.testing.assert_allclose(full.T @ full, np.eye(9), atol=1e-12)


def test_rows_with_labels_take_the_statistics_of_their_class():
    spec = gmm("edm", labels=True, means=[[2.0, 0.0], [-2.0, 0.0]], covariances=[[0.04, 0.5], [0.5, 0.04]])
    cond = torch.arange(600) % 2
    model = registry.models.build(spec).load("cpu")
    x = 80.0 * noise_of(600).at(-1).normal((2,), "prior")
    recipe = recipe_of(spec, {"name": "teleport", "rho": 0.3})
    sampler = sampler_of(recipe, cond)

    # Given its label a row's data are Gaussian, so even a skip to rho=0.3 is exact but for the statistics.
    def slope_free(x, t, c=None, inner=model.denoise):
        return inner(x, t, cond)

    model.denoise = slope_free
    exact = exact_flow(model, x, 1.0, sampler.times[0])
    assert rms(sampler.start(noise_of(600)).x, exact) < 0.05
    shared = sampler_of(recipe.override({"initial.per_class": False}), cond)
    assert rms(shared.start(noise_of(600)).x, exact) > 0.5
    # A row without a label takes those of all.
    free = replace(sampler, cond=torch.full_like(cond, 2))
    torch.testing.assert_close(free.start(noise_of(600)).x, shared.start(noise_of(600)).x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", ["vp", "edm"])
@pytest.mark.parametrize(("steps", "skipped"), [(18, 5), (40, 7)])
def test_a_sixth_of_the_evaluations_is_skipped_at_no_loss_on_digits(process, steps, skipped):
    spec, rows = DIGITS | {"process": process}, 48
    model = registry.models.build(spec).load("cpu")
    p = model.process
    grid, fine = (registry.times.build({"name": "karras", "num_steps": n})(p) for n in (steps, 200))
    heun = registry.solvers.build("heun")
    reference = Sampler(model, heun, fine).run(noise_of(rows)).x
    whole = rms(Sampler(model, heun, grid).run(noise_of(rows)).x, reference)
    # The same nodes without the first: what is left is stepped equally fine.
    rest = grid[skipped:]
    times = {"name": "explicit", "values": list(rest)}
    recipe = recipe_of(spec, {"name": "teleport", "rho": p.sigma(rest[0]) / p.alpha(rest[0])}, times, "heun")
    recipe.check()
    sampler = sampler_of(recipe)
    assert rms(sampler.run(noise_of(rows)).x, reference) < 1.01 * whole
    assert skipped / steps >= 0.15
    assert recipe.nfe == 2 * (steps - skipped) - 1 == sampler.model.rows / rows


# --- denoising MCMC --------------------------------------------------------------------------------------------------


def dmcmc(**fields):
    return {"name": "dmcmc", "num_levels": 40} | fields


def chain_ends(spec, rows, **fields):
    """Where the solver takes over, in units of x / alpha."""
    sampler = sampler_of(recipe_of(spec, dmcmc(**fields)))
    return (sampler.start(noise_of(rows)).x / sampler.model.process.alpha(sampler.times[0])).numpy()


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_a_chain_keeps_the_law_where_its_level_posterior_is_exact(process):
    rows, eta, variances = 3000, 0.2, np.array([0.25, 0.1])
    spec = gmm(process, means=[[0.5, -0.2]], covariances=[list(variances)])
    fields = {"num_moves": 60, "eta": eta, "low": 0.2, "high": 1.0, "level": 1.0, "num_data": 40_000}
    y = chain_ends(spec, rows, **fields)
    assert (np.abs(y.mean(0) - [0.5, -0.2]) < 5 * np.sqrt((variances + 1) / rows)).all()
    # Unadjusted Langevin steps inflate a level's variance by 1 / (1 - eta / 4) at most.
    ratio, error = y.var(0) / (variances + 1.0), math.sqrt(2 / rows)
    assert (ratio > 1 - 5 * error).all() and (ratio < 1 / (1 - eta / 4) + 5 * error).all()


def test_taking_the_cleanest_state_biases_the_law():
    rows, spec = 3000, gmm("edm", means=[[0.5, -0.2]], covariances=[[0.25, 0.1]])
    fields = {"num_moves": 40, "eta": 0.2, "low": 0.2, "high": 2.0, "level": 0.5, "num_data": 40_000}
    ratio = {
        select: chain_ends(spec, rows, select=select, **fields).var(0) / (np.array([0.25, 0.1]) + 0.25)
        for select in ("last", "min")
    }
    # The last state is a little narrow (one first-order step brings it down), the cleanest much too wide.
    assert (np.abs(ratio["last"] - 1) < 0.12).all()
    assert (ratio["min"] > 1.2).all()


def test_a_chain_visits_both_modes_and_the_cleanest_state_favours_one():
    weights = {}
    for select in ("last", "min"):
        recipe = recipe_of(
            gmm("edm", **TOY),
            dmcmc(num_moves=40, eta=0.2, low=0.1, high=3.0, level=0.3, select=select),
            {"name": "logsnr", "num_steps": 30},
            "dpmpp_2m",
        )
        sampler = sampler_of(recipe)
        end = sampler.run(noise_of(4000)).x
        model = registry.models.build(gmm("edm", **TOY)).load("cpu")
        weights[select] = float(torch.softmax(model._posterior(end, 1e-4, None)[0], 1)[:, 0].mean())
    # Standard error .008; .3 is exact. The level's law takes the mixture for a Gaussian, which costs the last state
    # some, and the cleanest state gains what it should not.
    assert weights["last"] == pytest.approx(0.3, abs=0.06)
    assert weights["min"] > weights["last"] + 5 * 0.008


def test_moves_are_counted():
    recipe = recipe_of(gmm(), dmcmc(num_moves=7), {"name": "logsnr", "num_steps": 5})
    recipe.check()
    sampler = sampler_of(recipe)
    sampler.run(noise_of(3))
    assert sampler.model.rows / 3 == recipe.nfe == 7 + 1 + 5
    assert (generate(recipe, 0, 4)["nfe"] == recipe.nfe).all()


def test_rows_of_a_chain_do_not_see_each_other():
    sampler = sampler_of(recipe_of(gmm(), dmcmc()))
    noise = noise_of(6)
    alone = sampler.start(replace(noise, indices=noise.indices[4:5])).x
    torch.testing.assert_close(alone[0], sampler.start(noise).x[4], rtol=1e-12, atol=1e-12)


# --- DPM-OT ----------------------------------------------------------------------------------------------------------


def cells(recipe, draws, label=None):
    """The share of the prior that every target gets, on new draws, and the targets and labels."""
    arrays = next(iter(calibration.make_all(recipe).values()))
    keep = np.ones(len(arrays["targets"]), bool) if label is None else arrays["labels"] == label
    y, h = torch.from_numpy(arrays["targets"][keep]).double(), torch.from_numpy(arrays["heights"][keep])
    z = noise_of(draws, seed=9).normal((y.shape[1],), "test")
    index = torch.cat([(part @ y.T + h).argmax(1) for part in z.split(10_000)])
    return torch.bincount(index, minlength=len(y)).numpy() / draws, y.numpy(), arrays["labels"][keep]


def test_every_cell_of_the_plane_has_its_share():
    recipe = recipe_of(gmm(), {"name": "dpm_ot", "num_targets": 64})
    share, _, _ = cells(recipe, 100_000)
    # Of 65536 draws a cell gets 1024 with a standard error of 3 %, and of these 2.5 %; without heights 54 are empty.
    assert 1 - 5 * 0.04 < share.min() * 64 and share.max() * 64 < 1 + 5 * 0.04


def test_no_cell_is_empty_in_64_dimensions():
    recipe = recipe_of(DIGITS, {"name": "dpm_ot"})
    share, y, _ = cells(recipe, 60_000)
    assert len(y) == 512 and (share > 0).all()
    # 128 draws a cell in the fit and 117 in the test: 13 % together.
    assert share.std() * 512 < 0.15
    assert share.min() * 512 > 1 - 5 * 0.125 and share.max() * 512 < 1 + 5 * 0.125


def test_the_modes_of_a_mixture_have_the_mass_of_their_targets():
    spec = gmm(weights=[0.3, 0.7], means=[[-2.0], [2.0]], covariances=[0.3, 0.3])
    share, y, _ = cells(recipe_of(spec, {"name": "dpm_ot", "level": 0.3, "num_targets": 256}), 100_000)
    right = y[:, 0] > 0
    assert share[right].sum() == pytest.approx(right.mean(), abs=0.02)


def test_rows_with_labels_go_to_data_of_their_class_in_equal_shares():
    recipe = recipe_of(DIGITS | {"labels": True}, {"name": "dpm_ot"})
    arrays = next(iter(calibration.make_all(recipe).values()))
    for label in (0, 7):
        share, y, _ = cells(recipe, 20_000, label)
        assert len(y) > 30 and (np.abs(share * len(y) - 1) < 0.4).all()
    cond = torch.arange(50) % 10
    sampler = sampler_of(recipe, cond)
    y = (sampler.start(noise_of(50)).x / sampler.model.process.alpha(sampler.times[0])).float().numpy()
    gaps = np.abs(y[:, None] - arrays["targets"][None]).max(-1)
    assert (gaps.min(1) < 1e-5).all()  # every state is a stored target
    assert (arrays["labels"][gaps.argmin(1)] == cond.numpy()).all()


def test_a_class_without_data_is_refused():
    recipe = recipe_of(DIGITS | {"labels": True}, {"name": "dpm_ot", "num_targets": 6})
    with pytest.raises(ValueError, match="drew no datum of class .* Raise num_targets"):
        calibration.make_all(recipe)


def test_outputs_have_nearly_the_law_of_the_data():
    spec, rows = gmm("edm", **TOY), 4000
    recipe = recipe_of(spec, {"name": "dpm_ot", "num_targets": 256}, {"name": "logsnr", "num_steps": 25}, "dpmpp_2m")
    end = sampler_of(recipe).run(noise_of(rows)).x.numpy()
    mean, covariance = registry.models.build(spec).moments()
    # 256 stored data: the standard error of their mean is .06, of their variance 9 %.
    assert abs(end.mean() - mean[0]) < 5 * 0.06
    assert end.var() == pytest.approx(covariance[0, 0], rel=0.35)


def test_the_memory_is_that_of_the_targets_and_nothing_is_evaluated():
    recipe = recipe_of(DIGITS, {"name": "dpm_ot", "num_targets": 100, "num_iterations": 5})
    arrays, cost = calibration.make(recipe, recipe.calibrations[0], recipe.parts)
    assert arrays["targets"].shape == (100, 64) and arrays["heights"].shape == arrays["labels"].shape == (100,)
    assert cost["nfe"] == 0 and recipe.nfe == 8


def test_neighbours_are_blended_but_not_across_modes():
    spec = gmm("edm", means=[[-20.0, 0.0], [20.0, 0.0]], covariances=[0.5, 0.5])
    recipe = recipe_of(spec, {"name": "dpm_ot", "num_targets": 64, "level": 0.2, "neighbours": 4, "max_angle": 10.0})
    y = sampler_of(recipe).start(noise_of(500)).x
    targets = next(iter(calibration.make_all(recipe).values()))["targets"]
    assert (y[:, 0].abs() > 17).all()  # none between the modes
    stored = (y.numpy()[:, None] - targets[None] == 0).all(-1).any(1)
    assert stored.mean() < 0.9  # blends are no stored targets


# --- shared noise ----------------------------------------------------------------------------------------------------


def shared(**fields):
    return {"name": "shared_noise", "num_candidates": 24, "num_references": 16, "first_references": 4} | fields


def bench_of(recipe):
    counted = CountedModel(recipe.parts.model.load("cpu"), recipe.batch_size)
    return Bench(recipe, recipe.parts, recipe.parts.guidance.wrap(counted), counted)


@pytest.mark.parametrize(
    ("model", "solver", "first"),
    [
        ({"name": "restore", "num_images": 96}, "dpmpp_2m", 32),
        ({"name": "gmm", "fit": "digits", "labels": True}, "dpmpp_2m", 0),
    ],
    ids=["restore", "digits"],
)
def test_a_shared_noise_beats_the_average_candidate_on_conditions_it_was_not_found_on(model, solver, first):
    recipe = recipe_of(model, shared(), {"name": "uniform", "num_steps": 5}, solver)
    recipe.check()
    arrays, cost = calibration.make(recipe, recipe.calibrations[0], recipe.parts)
    bench, plugin = bench_of(recipe), recipe.parts.initial
    samples, labels = recipe.parts.model.reference(96)
    images = torch.from_numpy(samples[-48:]).double().reshape(48, *recipe.parts.model.shape)
    cond = torch.from_numpy(labels[-48:])
    candidates = bench.noise(24).normal(tuple(recipe.parts.model.shape), purpose="candidates")
    errors = [plugin._error(bench, z, images, cond) for z in candidates]
    mine = plugin._error(bench, torch.from_numpy(arrays["noise"]), images, cond)
    assert min(abs(mine - e) for e in errors) < 1e-12  # it is one of them
    assert mine < np.mean(errors) and sum(e < mine for e in errors) < 8
    # Halving: 24 on 4 pairs, 12 on 8, 6 on 16.
    assert cost["nfe"] == 5 * (24 * 4 + 12 * 8 + 6 * 16)


def test_every_row_begins_with_the_same_noise():
    recipe = recipe_of(gmm("edm"), shared(num_candidates=4))
    x = sampler_of(recipe).start(noise_of(5)).x
    assert x.shape == (5, 2) and (x == x[:1]).all()
    rows = generate(recipe, 0, 4)["x0"]
    assert np.abs(rows - rows[:1]).max() == 0


@pytest.mark.parametrize("solver", [{"name": "ddim", "eta": 1.0}, {"name": "unified", "preset": "dpmpp_2m_sde"}])
def test_a_shared_noise_is_refused_with_a_solver_that_draws_its_own(solver):
    with pytest.raises(ValueError, match="found along an ODE, but solver .* draws noise"):
        recipe_of(gmm(), shared(), solver=solver).check()


# --- with times ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "initial", [{"name": "teleport", "rho": 5.0}, {"name": "dmcmc", "level": 0.5}, {"name": "dpm_ot", "level": 1.0}]
)
@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_grids_are_laid_from_where_the_initial_state_begins(initial, process):
    level = next(v for k, v in initial.items() if k in ("rho", "level"))
    start = registry.models.build(gmm(process)).noising.time(-math.log(level))
    for times in ("uniform", "karras", "logsnr", "quadratic"):
        recipe = recipe_of(gmm(process), initial, times)
        recipe.check()
        assert recipe.grid[0][0] == pytest.approx(start, rel=1e-12)
        assert recipe.grid[0][-1] == 0


def test_an_explicit_grid_must_begin_where_the_initial_state_does():
    begin = registry.models.build(gmm("edm")).noising.time(-math.log(10.0))
    for values, fits in (((begin, 0.01, 0.0), True), ((1.0, 0.5, 0.0), False), ((0.9 * begin, 0.01, 0.0), False)):
        recipe = recipe_of(gmm("edm"), "teleport", {"name": "explicit", "values": list(values)})
        if fits:
            recipe.check()
            assert np.isfinite(generate(recipe, 0, 8)["x0"]).all()
            continue
        with pytest.raises(ValueError, match="initial teleport begins at 0.125. Let the first time be that one"):
            recipe.check()


def test_a_stock_grid_begins_at_pure_noise_alone():
    recipe = recipe_of(gmm(), "teleport", {"name": "stock", "num_steps": 5}, {"name": "diffusers"})
    with pytest.raises(ValueError, match="stock"):
        recipe.check()


@pytest.mark.parametrize(
    "spec",
    [{"name": "teleport", "rho": 0.0}, {"name": "teleport", "num_data": 1}, {"name": "teleport", "rank": 0},
     {"name": "dmcmc", "low": 2.0, "high": 1.0}, {"name": "dmcmc", "eta": 3.0}, {"name": "dmcmc", "num_moves": 0},
     {"name": "dmcmc", "select": "best"}, {"name": "dpm_ot", "level": 0.0}, {"name": "dpm_ot", "num_targets": 0},
     {"name": "shared_noise", "num_candidates": 0}],
    ids=str,
)  # fmt: skip
def test_wrong_fields_are_refused(spec):
    with pytest.raises(ValueError, match=f"{spec['name']} needs|unknown select"):
        registry.initials.build(spec)
