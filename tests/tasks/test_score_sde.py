"""Score-SDE's own samplers and its exact likelihood, on models whose answer is known."""

import math
import shutil
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import likelihood as exact
from tasks import registry
from tasks.checkpoint import WEIGHTS
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.processes import VP
from tasks.sampler import CountedModel, Sampler, _Conditioned
from tasks.types import State

PROCESSES = ["vp", "edm", "flow"]
EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES)
RANGE = {"vp": (1.0, 0.1), "edm": (0.05, 0.0025), "flow": (1.0, 0.1)}  # EDM: sigma from 4 to 0.2


def noise_of(rows, seed=0, dtype=torch.float64):
    return RowNoise(seed, torch.arange(rows), dtype=dtype)


def sampler_of(spec, times, process="vp", model=None):
    model = GMM(process=process).load("cpu") if model is None else model
    return Sampler(CountedModel(model, 10**6), registry.solvers.build(spec), tuple(times))


def uniform(start, stop, num_steps):
    return [float(t) for t in np.linspace(start, stop, num_steps + 1)]


def dopri5(**fields):
    return {"name": "dopri5"} | fields


def corrected(**fields):
    return {"name": "predictor_corrector"} | fields


@lru_cache(maxsize=3)
def reference(process):
    """Start and end of sixteen paths of the probability-flow ODE from the exact score, to ten digits."""
    model, (start, stop) = GMM(process=process).load("cpu"), RANGE[process]
    p = model.process
    x = p.prior((2,), noise_of(16).at(-1), start)

    def slope(u, y):
        t = u if p.kind_of_path == "linear" else p.time(-math.log(u))
        state = p.ode(t)[0] * torch.from_numpy(y).view(x.shape)
        return ((torch.from_numpy(y).view(x.shape) - model.denoise(state, t)) / u).flatten().numpy()

    (scale, first), (end_scale, last) = p.ode(start), p.ode(stop)
    run = solve_ivp(slope, (first, last), (x / scale).flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return x, torch.from_numpy(run.y[:, -1]).view(x.shape) * end_scale


class PerRow:
    """An exact denoiser that answers row by row, so that its own bits cannot depend on a row's place in the batch."""

    def __init__(self, process):
        self.model = GMM(process=process).load("cpu")
        self.process, self.shape, self.num_classes = self.model.process, self.model.shape, 0

    def denoise(self, x, t, cond=None):
        times = t if isinstance(t, torch.Tensor) else torch.full((len(x),), t, dtype=torch.float64)
        return torch.cat([self.model.denoise(x[i : i + 1], times[i : i + 1]) for i in range(len(x))])


# --- the adaptive solver ---------------------------------------------------------------------------------------------


@EVERY_PROCESS
@pytest.mark.parametrize("stops", [1, 7])
def test_dopri5_reaches_the_reference_to_its_tolerance_and_its_error_falls_with_it(process, stops):
    errors, spent = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        spec = dopri5(rtol=tolerance, atol=tolerance)
        sampler = sampler_of(spec, uniform(*RANGE[process], stops), process)
        errors.append(float((sampler.run(noise_of(16)).x - reference(process)[1]).abs().max()))
        spent.append(sampler.model.rows // 16)
        assert errors[-1] < 20 * tolerance, (errors, spent)
    assert all(b < a / 2 for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < errors[0] / 1e4
    assert spent == sorted(spent)
    assert torch.equal(sampler.start(noise_of(16)).x, reference(process)[0])


@EVERY_PROCESS
def test_dopri5_beats_heun_at_equal_cost(process):
    sampler = sampler_of(dopri5(), RANGE[process], process)
    error = (sampler.run(noise_of(16)).x - reference(process)[1]).abs().max()
    evaluations = sampler.model.rows // 16
    heun = sampler_of({"name": "heun"}, uniform(*RANGE[process], evaluations // 2), process).run(noise_of(16)).x
    assert error < (heun - reference(process)[1]).abs().max()


@EVERY_PROCESS
@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.6, 0.2, 0.0)], ids=["one_step", "stops"])
def test_a_permuted_batch_gives_the_same_bits_permuted(process, times):
    rows, order = 12, torch.randperm(12, generator=torch.Generator().manual_seed(0))
    noise = noise_of(rows)
    straight = sampler_of(dopri5(), times, model=PerRow(process)).run(noise)
    moved = sampler_of(dopri5(), times, model=PerRow(process)).run(replace(noise, indices=noise.indices[order]))
    assert torch.equal(moved.x, straight.x[order])
    assert torch.equal(moved.x0_hat, straight.x0_hat[order])


@EVERY_PROCESS
@pytest.mark.parametrize("spec", [dopri5(), corrected()], ids=["dopri5", "predictor_corrector"])
def test_a_row_keeps_its_bits_among_other_neighbours(spec, process):
    times = (1.0, 0.5, 0.1, 0.0)
    among = sampler_of(spec, times, model=PerRow(process)).run(noise_of(6)).x
    others = RowNoise(0, torch.tensor([900, 901, 2, 902, 903, 904]), dtype=torch.float64)
    assert torch.equal(sampler_of(spec, times, model=PerRow(process)).run(others).x[2], among[2])


def test_rows_have_step_sizes_of_their_own():
    sampler = sampler_of(dopri5(rtol=1e-8, atol=1e-8), [1.0, 0.01])
    memory = sampler.run(noise_of(8)).memory
    assert len(memory["q"].unique()) > 4  # some are at the largest share
    assert len(memory["spent"].unique()) > 1
    assert sampler.model.rows == 8 * int(memory["spent"].max())  # the others wait for the slowest


@EVERY_PROCESS
def test_an_attempt_costs_six_evaluations_because_the_last_slope_is_used_again(process):
    for times in ((1.0, 0.0), (1.0, 0.5), (1.0, 0.7, 0.3, 0.0), (1.0, 0.7, GMM(process=process).noising.t_min, 0.0)):
        sampler = sampler_of(dopri5(rtol=0.01, atol=0.01), times, process)
        sampler.run(noise_of(5))
        spent = sampler.model.rows // 5
        assert sampler.model.rows % 5 == 0
        assert spent % 6 == 1
        least = sampler.solver.nfe if times[-1] == 0 else sampler.solver.nfe_before_data
        assert spent >= least(len(times) - 1)


@EVERY_PROCESS
def test_the_fewest_evaluations_are_spent_where_steps_are_short(process):
    grid = {"vp": [0.3, 0.299, 0.298], "edm": [0.01, 0.00999, 0.00998], "flow": [0.3, 0.299, 0.298]}[process]
    sampler = sampler_of(dopri5(rtol=0.1, atol=0.1), grid, process)
    sampler.run(noise_of(5))
    assert sampler.model.rows == 5 * sampler.solver.nfe_before_data(2)
    late = sampler_of(dopri5(), [0.5 * sampler.model.process.t_min, 0.0], process)
    late.run(noise_of(5))
    assert late.model.rows == 5 * late.solver.nfe(1) == 5


@EVERY_PROCESS
def test_the_last_bit_is_the_clean_prediction_at_the_first_training_time(process):
    model = GMM(process=process).load("cpu")
    t_min = model.process.t_min
    before = sampler_of(dopri5(), [1.0, t_min], model=model).run(noise_of(8))
    whole = sampler_of(dopri5(), [1.0, 0.0], model=model).run(noise_of(8))
    torch.testing.assert_close(whole.x, model.denoise(before.x, t_min), rtol=1e-10, atol=1e-10)
    assert torch.equal(whole.x, whole.x0_hat)


def test_rows_that_were_moved_between_steps_start_afresh_and_the_others_go_on():
    sampler = sampler_of(dopri5(), [1.0, 0.5, 0.0], model=PerRow("vp"))
    noise = noise_of(4)
    state = sampler.step(sampler.start(noise), noise)
    x = state.x.clone()
    x[1] += 0.25
    sampler.model.rows = 0
    moved = sampler.step(replace(state, x=x), noise).x
    alone = sampler.step(State(x, None, None, 1), noise).x
    undisturbed = sampler.step(state, noise).x
    torch.testing.assert_close(moved[1], alone[1], rtol=1e-3, atol=1e-3)  # the first step has another size
    assert not torch.allclose(moved[1], undisturbed[1], atol=1e-2)
    assert torch.equal(moved[[0, 2, 3]], undisturbed[[0, 2, 3]])


def test_float32_states_are_integrated_in_float64():
    narrow = sampler_of(dopri5(), [1.0, 0.5, 0.0]).run(noise_of(32, dtype=torch.float32))
    start = sampler_of(dopri5(), [1.0, 0.5, 0.0]).start(noise_of(32, dtype=torch.float32)).x
    assert narrow.x.dtype == narrow.x0_hat.dtype == torch.float32
    wide = State(start.double())
    sampler = sampler_of(dopri5(), [1.0, 0.5, 0.0])
    for _ in range(2):
        wide = sampler.step(wide, noise_of(32))
    assert torch.equal(narrow.x, wide.x.float())


def test_a_row_that_needs_too_much_is_refused_with_what_to_do():
    sampler = sampler_of(dopri5(max_evaluations=40), [1.0, 0.5, 0.0])
    with pytest.raises(
        ValueError, match=r"needs more than solver.max_evaluations=40 .* row 0 .* Raise solver.rtol=1e-05"
    ):
        sampler.run(noise_of(4))
    # It counts along the whole trajectory, not from one stop to the next.
    spent = sampler_of(dopri5(), [1.0, 0.5], "vp")
    spent.run(noise_of(4))
    enough = spent.model.rows // 4
    sampler_of(dopri5(max_evaluations=enough), [1.0, 0.5]).run(noise_of(4))
    with pytest.raises(ValueError, match="needs more than"):
        sampler_of(dopri5(max_evaluations=enough), [1.0, 0.5, 0.0]).run(noise_of(4))


def test_dopri5_refuses_a_number_of_evaluations_and_tolerances_that_are_none():
    assert registry.solvers.build(dopri5()).adaptive
    with pytest.raises(ValueError, match="cannot spend exactly 30 evaluations. Set solver.rtol"):
        registry.solvers.build(dopri5()).fit(30)
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"solver.{name} must be above 0, got 0.0"):
            registry.solvers.build(dopri5(**{name: 0.0}))
    with pytest.raises(ValueError, match="solver.max_evaluations must be at least 7, got 6"):
        registry.solvers.build(dopri5(max_evaluations=6))


# --- predictor and corrector -----------------------------------------------------------------------------------------

DIM, MEAN, VARIANCE = 64, 0.6, 0.25
SNR = 0.16


@lru_cache(maxsize=3)
def gaussian(process):
    return GMM(process=process, means=((MEAN,) * DIM,), covariances=(math.sqrt(VARIANCE),)).load("cpu")


def kept(process, s):
    """1 - beta of a VP's training step."""
    if not isinstance(process, VP):
        return 1.0
    return (process.alpha(s) / process.alpha(s - 1e-3)) ** 2


def after_corrector(ratio, process, s, snr=SNR):
    """Variance after a Langevin step on Gaussian data, both as shares of the right one V, at ``ratio`` before.

    With y = x - alpha m, ``e = 2 a r^2 D V^2 / |y|^2`` and E[1 / |y|^2] = 1 / (ratio V (D - 2)), which is exact where y
    is Gaussian. Where e meets its bound sigma^2 it is a constant.
    """
    right = process.alpha(s) ** 2 * VARIANCE + process.sigma(s) ** 2
    share, a = process.sigma(s) ** 2 / right, kept(process, s) * snr**2
    if 2 * a / ratio > share:
        return (1 - share) ** 2 * ratio + 2 * share
    return ratio - 4 * a + 4 * a * (1 + a) * DIM / ((DIM - 2) * ratio)


@EVERY_PROCESS
def test_without_corrector_steps_it_is_ddim_draw_for_draw(process):
    times = uniform(1.0, 0.0, 7)
    for predictor, eta in (("ancestral", 1.0), ("ode", 0.0)):
        a = sampler_of(corrected(predictor=predictor, corrector_steps=0), times, process).run(noise_of(32)).x
        b = sampler_of({"name": "ddim", "eta": eta}, times, process).run(noise_of(32)).x
        if eta == 1:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@EVERY_PROCESS
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
def test_one_corrector_step_has_the_variance_of_the_closed_form(process, ratio):
    model, rows = gaussian(process), 4000
    p, s = model.process, {"vp": 0.5, "edm": 0.01, "flow": 0.6}[process]
    right = p.alpha(s) ** 2 * VARIANCE + p.sigma(s) ** 2
    x = p.alpha(s) * MEAN + math.sqrt(ratio * right) * noise_of(rows, seed=5).normal((DIM,), "x")
    solver = registry.solvers.build(corrected())
    z = noise_of(rows).normal((DIM,), "z")
    y = solver._correct(p, x, model.denoise(x, s), z, s) - p.alpha(s) * MEAN
    squares = y.square().mean(dim=1) / right
    assert abs(y.mean()) < 5 * y.std() / math.sqrt(y.numel())
    expected = after_corrector(ratio, p, s)
    assert abs(squares.mean() - expected) < 5 * squares.std() / math.sqrt(rows)
    assert expected > ratio if ratio < 1 else expected < ratio + 0.01


@EVERY_PROCESS
@pytest.mark.parametrize("ratio", [0.25, 4.0])
def test_the_corrector_pulls_a_wrong_variance_to_the_right_one(process, ratio):
    model, rows, steps = gaussian(process), 200, 300
    p, s = model.process, {"vp": 0.5, "edm": 0.01, "flow": 0.6}[process]
    t = s + 1e-9  # the predictor does next to nothing
    right = p.alpha(s) ** 2 * VARIANCE + p.sigma(s) ** 2
    x = p.alpha(s) * MEAN + math.sqrt(ratio * right) * noise_of(rows, seed=5).normal((DIM,), "x")
    end = sampler_of(corrected(predictor="ode", corrector_steps=steps), [t, s], model=model)
    squares = (end.step(State(x), noise_of(rows)).x - p.alpha(s) * MEAN).square().mean(dim=1) / right
    for _ in range(steps):
        ratio = after_corrector(ratio, p, s)
    # The stationary variance is a few per cent off, as a Langevin step of this size must be.
    assert abs(ratio - (1 + kept(p, s) * SNR**2) * DIM / (DIM - 2)) < 1e-3
    assert abs(squares.mean() / ratio - 1) < 5 * math.sqrt(2 / (rows * DIM)) + 4 / DIM**2


def moments(process, predictor, times, correct=True):
    """Mean and variance of samples of the Gaussian: every predictor step is linear, and the corrector as above."""
    mean, variance = 0.0, process.prior_std(times[0]) ** 2
    for t, s in zip(times, times[1:], strict=False):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        added = max(sigma**2 - (alpha / process.alpha(s) * process.sigma(s)) ** 2, 0.0)
        nu2 = (predictor == "ancestral") * process.sigma(s) ** 2 / sigma**2 * added
        carry = math.sqrt(max(process.sigma(s) ** 2 - nu2, 0.0))
        a = process.alpha(s) * gain + carry * (1 - alpha * gain) / sigma
        mean = a * mean + (process.alpha(s) - carry * alpha / sigma) * (MEAN - gain * alpha * MEAN)
        variance = a**2 * variance + nu2
        if s > 0 and correct:
            right = process.alpha(s) ** 2 * VARIANCE + process.sigma(s) ** 2
            ratio = variance / right
            size = min(2 * kept(process, s) * SNR**2 / ratio, process.sigma(s) ** 2 / right)
            mean = process.alpha(s) * MEAN + (1 - size) * (mean - process.alpha(s) * MEAN)
            variance = right * after_corrector(ratio, process, s)
    return mean, variance


@EVERY_PROCESS
@pytest.mark.parametrize("predictor", ["ancestral", "ode"])
def test_samples_of_a_gaussian_have_the_right_moments(process, predictor):
    rows, model = 1000, gaussian(process)
    p = model.process
    grid = {"name": "uniform" if process != "edm" else "karras"}
    few, many = (registry.times.build(grid | {"num_steps": n})(p) for n in (30, 300))
    x = sampler_of(corrected(predictor=predictor), few, model=model).run(noise_of(rows)).x
    mean, variance = moments(p, predictor, few)
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / x.numel())
    # |y|^2 is not quite chi-squared after a step, which the closed form leaves out: an effect of order 1 / D^2.
    assert abs(x.var() / variance - 1) < 5 * math.sqrt(2 / x.numel()) + 4 / DIM**2
    # The law of the data itself: nearly with thirty steps, and with many up to the corrector's own few per cent.
    bias = [abs(moments(p, predictor, times)[1] / VARIANCE - 1) for times in (few, many)]
    assert bias[0] < 0.25
    assert bias[1] < 0.07
    assert abs(moments(p, predictor, many)[0] - MEAN) < 0.005
    if predictor == "ancestral":
        assert bias[0] < abs(moments(p, predictor, few, correct=False)[1] / VARIANCE - 1)


def test_a_score_that_vanishes_does_not_send_a_row_away():
    model = GMM(means=((0.0,),), covariances=(1.0,)).load("cpu")
    solver = registry.solvers.build(corrected())
    x = torch.tensor([[0.0], [1e-12], [1.0]], dtype=torch.float64)
    moved = solver._correct(model.process, x, model.denoise(x, 0.3), torch.ones_like(x), 0.3)
    assert (moved - x).abs().max() <= math.sqrt(2) * model.process.sigma(0.3)


def test_every_corrector_step_draws_new_noise():
    solver = corrected(corrector_steps=3)
    asked = []

    class Listening:
        num_rows = 2

        def normal(self, shape, purpose):
            asked.append(purpose)
            return torch.zeros(2, *shape, dtype=torch.float64)

    sampler = sampler_of(solver, [0.5, 0.4])
    sampler.solver.step(_Conditioned(sampler.model, None), State(torch.ones(2, 2).double()), 0.5, 0.4, Listening())
    assert asked == ["step", "corrector/0", "corrector/1", "corrector/2"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("leading", [0, 1, 5])
def test_corrector_evaluations_are_counted(steps, leading):
    spec = corrected(corrector_steps=steps, leading_uncorrected_steps=leading)
    solver = registry.solvers.build(spec)
    for num_steps in (1, 2, 4):
        for stop, spent in ((0.0, solver.nfe), (0.2, solver.nfe_before_data)):
            sampler = sampler_of(spec, uniform(1.0, stop, num_steps))
            sampler.run(noise_of(3))
            assert sampler.model.rows == 3 * spent(num_steps)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_any_number_of_evaluations_is_spent_exactly_with_most_steps_corrected(steps):
    for nfe in range(1, 40):
        fields, num_steps = registry.solvers.build(corrected(corrector_steps=steps)).fit(nfe)
        assert registry.solvers.build(corrected(corrector_steps=steps) | fields).nfe(num_steps) == nfe
        assert 0 <= fields["leading_uncorrected_steps"] <= steps


def test_the_plain_ode_predictor_is_deterministic_and_everything_else_is_not():
    assert not registry.solvers.build(corrected(predictor="ode", corrector_steps=0)).stochastic
    assert registry.solvers.build(corrected(predictor="ode")).stochastic
    assert registry.solvers.build(corrected(corrector_steps=0)).stochastic


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predictor": "euler"}, "unknown predictor 'euler'.* Allowed: ancestral, ode"),
        ({"corrector_steps": -1}, "solver.corrector_steps must be at least 0, got -1"),
        ({"snr": 0.0}, "solver.snr must be above 0, got 0.0. Set solver.corrector_steps=0"),
        ({"leading_uncorrected_steps": -2}, "solver.leading_uncorrected_steps must be at least 0, got -2"),
    ],
)
def test_a_predictor_corrector_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.solvers.build(corrected(**fields))


# --- both ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [*PROCESSES, "cosine"])
@pytest.mark.parametrize(
    "spec",
    [dopri5(), corrected(), corrected(predictor="ode", corrector_steps=2)],
    ids=["dopri5", "ancestral", "ode"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_are_finite_at_both_ends(spec, process, dtype):
    model = GMM(process="vp" if process == "cosine" else process).load("cpu")
    if process == "cosine":
        model.process = VP("squaredcos_cap_v2")  # alpha(1) is 5e-5
    for times in ([1.0, 0.0], [1.0, 0.999999, 1e-6, 0.0], [1.0, 0.9, 0.8, 0.7, 1e-4, 0.0]):
        state = sampler_of(spec, times, model=model).run(noise_of(32, dtype=dtype))
        assert state.x.dtype == dtype
        assert torch.isfinite(state.x).all()
    assert sampler_of(dopri5(), [1.0, 0.0], model=model).run(noise_of(32, dtype=dtype)).x.abs().max() < 4


# --- likelihood ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def data(process, rows=64):
    spec = GMM(process=process)
    return spec.load("cpu"), torch.from_numpy(spec.reference(rows)[0]).double()


def change_of_the_density(model, x0, found, t=None):
    """What the exact densities say about the volume between the first time and t=1."""
    return model.log_density(x0, model.process.t_min if t is None else t) - model.log_density(found.x1, 1.0)


@EVERY_PROCESS
def test_the_exact_trace_gives_the_density_of_the_mixture(process):
    model, x0 = data(process)
    found = exact.likelihood(model, x0, None, None, steps=160, probes=0, displacement=1e-3)
    assert found.total.dtype == torch.float64
    assert (found.change - change_of_the_density(model, x0, found)).abs().max() < 1e-3
    # What is left is the prior, which only a flow reaches exactly.
    gap = found.prior - model.log_density(found.x1, 1.0)
    torch.testing.assert_close(found.total - model.log_density(x0, model.process.t_min), gap, rtol=0, atol=1e-3)
    assert gap.abs().max() < (1e-9 if process == "flow" else 0.03)


@EVERY_PROCESS
def test_the_likelihood_converges_at_fourth_order(process):
    model, x0 = data(process)
    errors = []
    for steps in (40, 80, 160):
        found = exact.likelihood(model, x0, None, None, steps, probes=0, displacement=1e-4)
        errors.append(float((found.change - change_of_the_density(model, x0, found)).abs().mean()))
    slope = -np.polyfit(np.log([40, 80, 160]), np.log(errors), 1)[0]
    assert slope > 3.5, (slope, errors)


@EVERY_PROCESS
def test_the_default_displacement_costs_little_on_average(process):
    model, x0 = data(process, 256)
    found = exact.likelihood(model, x0, None, None, steps=160, probes=0)
    error = found.change - change_of_the_density(model, x0, found)
    assert abs(error.mean()) < 2e-4
    assert error.abs().max() < 5e-3


def test_the_path_ends_on_the_noise_that_makes_the_data():
    model, x0 = data("flow")
    x1 = exact.likelihood(model, x0, None, None, steps=160, probes=0).x1
    sampler = sampler_of(dopri5(rtol=1e-9, atol=1e-9), [1.0, model.process.t_min], model=model)
    torch.testing.assert_close(sampler.step(State(x1), noise_of(64)).x, x0, rtol=0, atol=1e-4)


@EVERY_PROCESS
def test_hutchinsons_estimate_is_unbiased(process):
    spec = GMM(dim=8, process=process, seed=1)
    model = spec.load("cpu")
    x0 = torch.from_numpy(spec.reference(4)[0]).double()
    want = exact.log_likelihood(model, x0, None, None, steps=20, probes=0, displacement=1e-3)
    draws = 400
    many = x0.repeat(draws, 1)
    got = exact.log_likelihood(model, many, None, noise_of(len(many)), steps=20, displacement=1e-3).view(draws, 4)
    error = got.std(dim=0) / math.sqrt(draws)
    assert (error > 0.005).all()  # the estimator is random, so the claim says something
    assert ((got.mean(dim=0) - want).abs() < 5 * error).all()
    # Sixteen probes are sixteen times better.
    more = exact.log_likelihood(
        model, x0.repeat(100, 1), None, noise_of(400), steps=20, probes=16, displacement=1e-3
    ).view(100, 4)
    ratio = (more.var(dim=0).mean() / got.var(dim=0).mean()).item()
    assert 1 / 32 < ratio < 1 / 8


def test_probes_belong_to_rows():
    model, x0 = data("vp", 6)
    model = PerRow("vp")
    noise, order = noise_of(6), torch.tensor([4, 1, 5, 0, 2, 3])
    straight = exact.log_likelihood(model, x0, None, noise, steps=4)
    moved = exact.log_likelihood(model, x0[order], None, replace(noise, indices=noise.indices[order]), steps=4)
    assert torch.equal(moved, straight[order])
    assert not torch.allclose(exact.log_likelihood(model, x0, None, noise_of(6, seed=1), steps=4), straight)


@EVERY_PROCESS
def test_float32_data_have_the_likelihood_of_float64_data(process):
    model, x0 = data(process)
    narrow = exact.log_likelihood(model, x0.float(), None, noise_of(64), steps=10)
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, exact.log_likelihood(model, x0, None, noise_of(64), steps=10))


def test_labels_give_the_density_of_their_component():
    spec = GMM(labels=True)
    model, (x0, labels) = spec.load("cpu"), spec.reference(30)
    x0, cond = torch.from_numpy(x0).double(), torch.from_numpy(labels)
    weights, means, covariances = spec.parameters
    given = exact.log_likelihood(model, x0, cond, None, steps=80, probes=0)
    for k in range(3):
        alone = GMM(means=(tuple(means[k]),), covariances=(tuple(map(tuple, covariances[k])),)).load("cpu")
        chosen = cond == k
        assert chosen.any()
        torch.testing.assert_close(
            given[chosen], exact.log_likelihood(alone, x0[chosen], None, None, steps=80, probes=0), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("t_min", [0.2, 0.02])
def test_the_density_may_be_asked_at_another_time(t_min):
    model, x0 = data("flow")
    found = exact.likelihood(model, x0, None, None, steps=80, probes=0, t_min=t_min, displacement=1e-3)
    assert (found.total - model.log_density(x0, t_min)).abs().max() < 1e-3


@EVERY_PROCESS
@pytest.mark.parametrize("probes", [0, 1, 3])
def test_evaluations_of_a_likelihood_are_as_stated(process, probes):
    model, x0 = data(process, 5)
    counted = CountedModel(model, 3)
    exact.log_likelihood(counted, x0, None, noise_of(5), steps=6, probes=probes)
    assert counted.rows == 5 * exact.evaluations(6, probes, 2)


@EVERY_PROCESS
def test_the_likelihood_of_points_far_from_the_data_is_finite(process):
    model, _ = data(process)
    far = torch.tensor([[30.0, -30.0], [0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    values = exact.log_likelihood(model, far, None, None, probes=0)
    assert torch.isfinite(values).all()
    assert values[0] < values[2] < values[1]


@pytest.mark.parametrize("name", ["digits", "digits_flow"])
def test_hutchinson_and_the_exact_trace_agree_on_a_network(name):
    spec = registry.models.build(name)
    model, (images, labels) = spec.load("cpu"), spec.reference()
    x0, cond = torch.from_numpy(images[:1]), torch.from_numpy(labels[:1])
    want = exact.log_likelihood(model, x0, cond, None, steps=8, probes=0)
    draws = 24
    got = exact.log_likelihood(model, x0.repeat(draws, 1, 1, 1), cond.repeat(draws), noise_of(draws), steps=8)
    assert abs(got.mean() - want[0]) < 5 * got.std() / math.sqrt(draws)


def test_bits_per_dim_of_known_densities():
    # A density spread over the range [-1, 1] is 8 bits for 256 levels and log2(17) bits, nearly 4, for bins of 2/16.
    dim = 10
    spread = dim * math.log(0.5)
    assert exact.bits_per_dim(spread, dim, 2 / 256) == pytest.approx(8)
    assert exact.bits_per_dim(spread, dim, 2 / 16) == pytest.approx(4)
    assert exact.bits_per_dim(0.0, dim, 2 / 256) == pytest.approx(7)  # Song et al.'s offset
    assert exact.bits_per_dim(0.0, dim, 2 / 16) == pytest.approx(3)
    assert exact.bits_per_dim(math.log(2.0) * dim, dim, 1.0) == pytest.approx(-1)
    torch.testing.assert_close(
        exact.bits_per_dim(torch.tensor([0.0, spread]), dim, 2 / 16), torch.tensor([3.0, 4.0]), rtol=1e-6, atol=1e-6
    )
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bin_width must be above 0"):
            exact.bits_per_dim(0.0, dim, width)


def test_dequantised_data_fill_their_bins():
    x0 = torch.full((2000, 3), -1.0)
    spread = exact.dequantise(x0, 0.125, noise_of(2000)) - x0
    assert spread.abs().max() <= 0.0625
    assert abs(spread.mean()) < 5 * 0.125 / math.sqrt(12 * 6000)
    assert spread.std() == pytest.approx(0.125 / math.sqrt(12), rel=0.05)


def test_what_has_no_likelihood_is_refused():
    model, x0 = data("vp", 3)
    cases = [
        ({"steps": 5}, "steps must be an even number of at least 2 .*, got 5"),
        ({"steps": 0}, "steps must be an even number"),
        ({"probes": -1}, "probes must be at least 1, or 0 for the exact trace, got -1"),
        ({"t_min": 0.0}, "t_min must lie between 0 and 1, got 0.0"),
        ({"t_min": 1.0}, "t_min must lie between 0 and 1, got 1.0"),
        ({"displacement": 0.0}, "displacement must be above 0"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            exact.log_likelihood(model, x0, None, noise_of(3), **fields)
    with pytest.raises(ValueError, match="probes=1 need noise"):
        exact.log_likelihood(model, x0, None)
    tokens = registry.models.build("table").load("cpu")
    with pytest.raises(ValueError, match="needs a Gaussian process, but the model's is masked"):
        exact.log_likelihood(tokens, torch.zeros(3, 4), None, noise_of(3))


# --- the reward ------------------------------------------------------------------------------------------------------


def reward(**fields):
    return registry.rewards.build({"name": "log_likelihood", "model": {"name": "gmm"}} | fields)


def test_the_reward_is_the_log_likelihood():
    model, x0 = data("vp", 20)
    values = reward(steps=40, probes=0)(x0.float(), None)
    torch.testing.assert_close(values, exact.log_likelihood(model, x0.float(), None, None, 40, 0))
    estimate = reward(steps=40, probes=200)(x0.float(), None)
    torch.testing.assert_close(estimate, values, rtol=0, atol=0.5)


def test_a_score_depends_on_the_sample_and_the_seed_alone():
    _, x0 = data("vp", 20)
    x0, plugin = x0.float(), reward(steps=8)
    whole = plugin(x0, None)
    torch.testing.assert_close(plugin(x0.flip(0), None).flip(0), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plugin(x0[7:9], torch.zeros(2, dtype=torch.int64)), whole[7:9], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(reward(steps=8, seed=1)(x0, None), whole)


def test_a_conditional_reward_asks_for_the_rows_label():
    labelled = {"name": "gmm", "labels": True}
    x0, cond = torch.tensor([[0.1, 0.2]] * 3), torch.tensor([0, 1, 2])
    free = reward(model=labelled, steps=20, probes=0)
    given = reward(model=labelled, steps=20, probes=0, conditional=True)
    assert given.needs_labels and not free.needs_labels
    assert len(free(x0, cond).unique()) == 1
    assert len(given(x0, cond).unique()) == 3


def test_a_reward_that_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="steps must be an even number"):
        reward(steps=7)
    with pytest.raises(ValueError, match="reward.conditional needs a model with labels, but gmm has none"):
        reward(conditional=True)
    with pytest.raises(ValueError, match="needs a Gaussian process"):
        reward(model={"name": "table"})
    with pytest.raises(ValueError, match="unknown model 'gnm', did you mean 'gmm'"):
        reward(model={"name": "gnm"})
    reward().check((2,))
    with pytest.raises(ValueError, match=r"knows samples of shape \(2,\), but these have shape \(1, 8, 8\)"):
        reward().check((1, 8, 8))


def test_another_model_is_another_revision():
    assert reward(model={"name": "digits"}).revision != reward(model={"name": "digits_flow"}).revision


def test_a_model_that_moved_is_the_same_revision(tmp_path):
    shutil.copytree(WEIGHTS / "digits", tmp_path / "moved")
    moved = {"name": "digits", "path": str(tmp_path / "moved")}
    assert reward(model=moved).revision == reward(model={"name": "digits"}).revision
