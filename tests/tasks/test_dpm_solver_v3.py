"""DPM-Solver-v3: its trivial statistics, exactness on Gaussian data, orders, errors at few steps, and its artifact.

The toy is a mixture in one dimension on the linear-beta VP process from t=1 to 0.05, equally spaced in log-SNR.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import calibration, registry
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.sampler import Sampler
from tasks.types import State

TOY = {"weights": [0.3, 0.7], "means": [[-1.0], [0.8]], "covariances": [0.4, 0.5]}
RANGES = {"vp": (1.0, 0.05), "edm": (0.05, 0.0025), "flow": (0.95, 0.1)}
ROWS = 1024


def noise_of(rows=ROWS):
    return RowNoise(0, torch.arange(rows), dtype=torch.float64)


def mixture(process="vp", **fields):
    return {"name": "gmm", "process": process} | (fields or TOY)


def recipe_of(model, solver, **fields):
    solver = {"name": "dpm_solver_v3"} | solver
    times = {"name": "logsnr", "num_steps": 6}
    parts = {"guidance": "none", "batch_size": 512, "dtype": "float64"} | fields
    guidance = parts.pop("guidance")
    return Recipe(model, solver, times, guidance, "single", **parts).completed()


def fitted(model, **solver):
    """The solver with its statistics."""
    recipe = recipe_of(model, solver)
    return calibration.bound(recipe, calibration.make_all(recipe)).solver


def unified(**fields):
    return registry.solvers.build({"name": "unified"} | fields)


def trivial(statistics, **fields):
    return registry.solvers.build({"name": "dpm_solver_v3", "statistics": statistics} | fields)


def logsnr(process, start, stop, num_steps):
    lams = np.linspace(process.lam(start), process.lam(stop), num_steps + 1)
    return (start, *(process.time(float(lam)) for lam in lams[1:-1]), stop)


class Bench:
    """The toy on a process, and where its probability-flow ODE really ends."""

    def __init__(self, process):
        self.model, (self.start, self.stop) = registry.models.build(mixture(process)).load("cpu"), RANGES[process]
        p = self.model.process
        x = p.prior((1,), noise_of().at(-1), self.start)

        def slope(u, y):  # y = x / alpha over u = sigma / alpha
            t = p.time(-math.log(u))
            state = p.alpha(t) * torch.from_numpy(y)[:, None]
            return ((state - p.alpha(t) * self.model.denoise(state, t)) / p.sigma(t))[:, 0].numpy()

        span = [p.sigma(t) / p.alpha(t) for t in (self.start, self.stop)]
        run = solve_ivp(slope, span, (x / p.alpha(self.start))[:, 0].numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
        self.end = p.alpha(self.stop) * torch.from_numpy(run.y[:, -1:])

    def run(self, solver, num_steps):
        times = logsnr(self.model.process, self.start, self.stop, num_steps)
        return Sampler(self.model, solver, times).run(noise_of()).x

    def error(self, solver, num_steps):
        return float((self.run(solver, num_steps) - self.end).square().mean().sqrt())


@pytest.fixture(scope="module")
def bench():
    made = {}

    def get(process="vp"):
        if process not in made:
            made[process] = Bench(process)
        return made[process]

    return get


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", list(RANGES))
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("statistics", "prediction"), [("data", "x0"), ("noise", "eps")])
def test_trivial_statistics_are_the_data_and_the_noise_integrator(bench, process, order, statistics, prediction):
    place = bench(process)
    for steps in (5, 20):
        ours = place.run(trivial(statistics, max_order=order, corrector=False), steps)
        theirs = place.run(unified(preset="ddim", prediction=prediction, max_order=order), steps)
        # Simpson's rule on 129 points of a step: 1e-9 with five steps.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_with_data_statistics_is_the_free_corrector(bench, order):
    ours = bench().run(trivial("data", max_order=order), 10)
    theirs = bench().run(unified(preset="ddim", max_order=order, corrector="pseudo"), 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_it_runs_from_pure_noise_to_data_and_its_first_step_is_ddim(process):
    solver = fitted(mixture(process))
    model = registry.models.build(mixture(process)).load("cpu")
    times = registry.times.build({"name": "logsnr", "num_steps": 10})(model.process)
    x = Sampler(model, solver, times).run(noise_of(64)).x
    assert torch.isfinite(x).all() and x.abs().max() < 4
    one = [Sampler(model, s, (1.0, 0.0)).run(noise_of(64)).x for s in (solver, unified(preset="ddim"))]
    torch.testing.assert_close(*one, rtol=1e-10, atol=1e-10)


def test_the_corrector_keeps_sigma_eps_minus_l_x():
    model = registry.models.build(mixture()).load("cpu")
    solver, p = fitted(mixture(), max_order=2), model.process
    times = logsnr(p, 1.0, 0.05, 6)
    sampler = Sampler(model, solver, times)
    state = sampler.start(noise_of(16))
    i = 4  # the last step that is made
    for _ in range(i + 1):
        before, state = state, sampler.step(state, noise_of(16))
    plan, corrected = state.memory["plan"], state.memory["base"]
    assert (corrected - before.x).abs().max() > 1e-4  # the corrector moved the state
    eps = (before.x - p.alpha(times[i]) * model.denoise(before.x, times[i])) / p.sigma(times[i])
    l = torch.from_numpy(plan.l_at[i])  # noqa: E741
    kept = p.sigma(times[i]) * eps - l * before.x
    torch.testing.assert_close(p.alpha(times[i]) * state.memory["history"][0], kept, rtol=1e-12, atol=1e-12)
    reset = (kept + l * corrected) / p.sigma(times[i])
    clean = (corrected - p.sigma(times[i]) * reset) / p.alpha(times[i])
    torch.testing.assert_close(plan.clean(i, corrected, state.memory["history"][0]), clean, rtol=1e-10, atol=1e-10)


def test_a_last_jump_to_the_data_uses_the_corrected_state():
    model, solver = registry.models.build(mixture()).load("cpu"), fitted(mixture(), max_order=2)
    times = (*logsnr(model.process, 1.0, 0.05, 5), 0.0)
    state = Sampler(model, solver, times).run(noise_of(8))
    plan = state.memory["plan"]
    assert torch.equal(state.x, plan.clean(5, state.memory["base"], state.memory["history"][0]))
    assert not torch.allclose(state.x, state.x0_hat)  # the prediction of the state before correction


# --- exactness, orders, errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", list(RANGES))
def test_one_step_is_exact_on_gaussian_data_up_to_the_lattice_of_statistics(process):
    spec = mixture(process, means=[[0.6, -0.3]], covariances=[[0.25, 0.04]])
    model, (start, stop) = registry.models.build(spec).load("cpu"), RANGES[process]
    x = model.process.prior((2,), noise_of(64).at(-1), start)
    exact, found = model.flow_map(x, start, stop), {}

    def error(solver):
        return float((Sampler(model, solver, (start, stop)).run(noise_of(64)).x - exact).square().mean().sqrt())

    for levels in (30, 120, 1200):
        found[levels] = error(fitted(spec, max_order=1, num_levels=levels, num_data=32, corrector=False))
    # Central differences and quadrature are of second order in the spacing of the levels: 16 and 100 times less.
    assert found[120] < found[30] / 10 and found[1200] < found[120] / 30
    assert found[1200] < 1e-4 and found[120] < 5e-3
    assert error(unified(preset="ddim")) > 0.15


def test_s_is_zero_where_f_does_not_vary():
    spec = mixture(means=[[0.6, -0.3]], covariances=[[0.25, 0.04]])
    arrays = next(iter(calibration.make_all(recipe_of(spec, {"num_data": 32})).values()))
    assert (arrays["s"] == 0).all()
    # l is the exact slope sigma d eps / dx = sigma^2 / (alpha^2 v + sigma^2), which does not depend on the data here.
    process = registry.models.build(spec).noising
    t = [process.time(float(lam)) for lam in arrays["lam"]]
    alpha, sigma = np.array([process.alpha(v) for v in t])[:, None], np.array([process.sigma(v) for v in t])[:, None]
    np.testing.assert_allclose(arrays["l"], sigma**2 / (alpha**2 * np.array([0.25, 0.04]) + sigma**2), atol=1e-7)
    np.testing.assert_array_less(np.abs(arrays["b"]), 1e6)


@pytest.mark.parametrize("process", list(RANGES))
@pytest.mark.parametrize(
    ("fields", "order"),
    [
        ({"max_order": 1, "corrector": False}, 1),
        ({"max_order": 2, "corrector": False}, 2),
        ({"max_order": 3, "corrector": False}, 3),
        ({"max_order": 1}, 2),
        ({"max_order": 2}, 3),
        ({"max_order": 3}, 4),
        ({"max_order": 3, "corrector": False, "pseudo": True}, 2),
        ({"max_order": 3, "pseudo": True}, 2),
        ({"max_order": 1, "pseudo": True}, 2),
    ],
    ids=str,
)
def test_it_converges_at_its_declared_order(bench, process, fields, order):
    solver = fitted(mixture(process), **fields)
    counts = (40, 80, 160)
    errors = [bench(process).error(solver, n) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    # Order 4 is reached from above on VP (4.2 over this range); all others are within 0.15.
    assert slope == pytest.approx(order, abs=0.25), (slope, errors)
    assert solver.order == order


def test_errors_at_ten_steps_are_the_published_toy_numbers(bench):
    # Measured when the method was specified: .0392, .0128, .0123 and .0107 with other draws. Ours are .0446, .0129,
    # .0139 and .0116; statistics of 512 data and 1024 starts scatter by a tenth.
    found = {
        (order, corrector): bench().error(fitted(mixture(), max_order=order, corrector=corrector), 10)
        for order, corrector in ((1, False), (2, False), (3, False), (3, True))
    }
    for place, value in {(1, False): 0.0392, (2, False): 0.0128, (3, False): 0.0123, (3, True): 0.0107}.items():
        assert found[place] == pytest.approx(value, rel=0.2), (place, found)
    data = [bench().error(unified(preset="ddim", max_order=order), 10) for order in (1, 2, 3)]
    assert data == pytest.approx([0.131, 0.0296, 0.0363], rel=0.1)


@pytest.mark.parametrize("steps", [5, 6, 8, 10])
def test_it_beats_dpmpp_and_unipc_at_five_to_ten_evaluations(bench, steps):
    ours = bench().error(fitted(mixture(), pseudo=True), steps)
    for preset in ("dpmpp_2m", "dpmpp_3m", "unipc"):
        assert ours < 0.85 * bench().error(unified(preset=preset), steps)
    assert bench().error(fitted(mixture()), 10) < 0.85 * bench().error(unified(preset="unipc"), 10)


# --- the artifact ----------------------------------------------------------------------------------------------------

LABELLED = {"name": "gmm", "labels": True}


def keys(recipe):
    return [c.key for c in recipe.calibrations]


def test_one_artifact_serves_other_steps_orders_and_times():
    recipe = recipe_of(mixture(), {})
    for change in ({"nfe": 9}, {"times.num_steps": 3}, {"times": "karras"}, {"solver.max_order": 2},
                   {"solver.corrector": False}, {"solver.pseudo": True}, {"batch_size": 64}):  # fmt: skip
        assert keys(recipe.override(change)) == keys(recipe), change
    for change in ({"solver.num_levels": 60}, {"solver.num_data": 64}, {"model.ridge": 0.1}, {"seed": 1}):
        assert keys(recipe.override(change)) != keys(recipe), change
    assert keys(recipe.override({"solver.statistics": "data"})) == []


def test_another_guidance_scale_is_another_artifact_with_other_statistics():
    solver = {"num_levels": 16, "num_data": 64}
    mild, strong = (
        recipe_of(LABELLED, solver, guidance={"name": "cfg", "scale": scale}, labels="cycle") for scale in (1.0, 5.0)
    )
    assert keys(mild) != keys(strong)
    a, b = (next(iter(calibration.make_all(recipe).values())) for recipe in (mild, strong))
    assert np.abs(a["l"] - b["l"]).max() > 0.1


def test_statistics_are_counted_and_have_one_number_a_level_and_dimension():
    recipe = recipe_of({"name": "gmm", "dim": 5}, {"num_levels": 16, "num_data": 40}, batch_size=16)
    arrays, cost = calibration.make(recipe, recipe.calibrations[0], recipe.parts)
    assert cost["nfe"] == 16 * 40 * 5  # the state, two along the probe, two along the trajectory
    assert {name: value.shape for name, value in arrays.items()} == {
        "lam": (16,), "l": (16, 5), "s": (16, 5), "b": (16, 5),
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields", [{"statistics": "other"}, {"max_order": 4}, {"num_levels": 7}, {"num_data": 1}, {"max_order": 0}]
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError, match="dpm_solver_v3 needs|unknown statistics"):
        registry.solvers.build({"name": "dpm_solver_v3"} | fields)


def test_a_step_leaves_the_state_it_starts_from(bench):
    solver, model = fitted(mixture()), bench().model
    sampler = Sampler(model, solver, logsnr(model.process, 1.0, 0.05, 6))
    state = sampler.start(noise_of(4))
    for _ in range(3):
        state = sampler.step(state, noise_of(4))
    x = state.x.clone()
    first, again = sampler.step(state, noise_of(4)), sampler.step(state, noise_of(4))
    assert isinstance(first, State) and torch.equal(first.x, again.x) and torch.equal(state.x, x)
