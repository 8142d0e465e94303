"""Noising processes, prediction conversions and time grids."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.noise import RowNoise
from tasks.processes import EDM, VP, Flow, Masked, categorical, from_x0, to_x0, transfer
from tasks.registry import times as times_registry

PROCESSES = {
    "vp_linear": VP(),
    "vp_scaled_linear": VP("scaled_linear", 0.00085, 0.012),
    "vp_cosine": VP("squaredcos_cap_v2"),
    "edm": EDM(),
    "flow": Flow(),
}
GAUSSIAN = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
KINDS = ["epsilon", "sample", "v_prediction", "flow", "score"]
DENSE = np.linspace(0.0, 1.0, 4097)
exactly = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def noise_of(rows, seed=0, dtype=torch.float64):
    return RowNoise(seed, torch.arange(rows), dtype=dtype)


# --- schedules -------------------------------------------------------------------------------------------------------


@GAUSSIAN
def test_time_inverts_lam_on_a_dense_grid(process):
    inner = DENSE[1:-1]
    back = np.array([process.time(process.lam(float(t))) for t in inner])
    np.testing.assert_allclose(back, inner, rtol=1e-9, atol=1e-12)


@GAUSSIAN
@exactly
@given(t=st.floats(min_value=1e-6, max_value=1 - 1e-6))
def test_time_inverts_lam_anywhere(process, t):
    assert process.time(process.lam(t)) == pytest.approx(t, rel=1e-7, abs=1e-10)


@GAUSSIAN
def test_lam_is_the_log_ratio_and_grows_towards_the_data(process):
    inner = DENSE[1:-1]
    lam = np.array([process.lam(float(t)) for t in inner])
    ratio = np.array([math.log(process.alpha(float(t)) / process.sigma(float(t))) for t in inner])
    np.testing.assert_allclose(lam, ratio, rtol=1e-12, atol=1e-12)
    assert (np.diff(lam) < 0).all()


@GAUSSIAN
def test_the_data_end_is_clean(process):
    assert process.alpha(0.0) == 1.0
    assert process.sigma(0.0) == 0.0
    assert process.lam(0.0) == math.inf


@pytest.mark.parametrize("name", ["vp_linear", "vp_scaled_linear", "vp_cosine"])
def test_vp_keeps_the_variance_of_unit_data(name):
    t = torch.from_numpy(DENSE)
    process = PROCESSES[name]
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1.0, rtol=1e-14)


def test_edm_and_flow_are_the_textbook_processes():
    t = torch.from_numpy(DENSE)
    np.testing.assert_array_equal(Flow().alpha(t), 1 - DENSE)
    np.testing.assert_array_equal(Flow().sigma(t), DENSE)
    np.testing.assert_array_equal(EDM().alpha(t), np.ones_like(DENSE))
    np.testing.assert_allclose(EDM().sigma(t), 80 * DENSE, rtol=1e-15)


@pytest.mark.parametrize(
    "process",
    [PROCESSES["vp_linear"], PROCESSES["vp_scaled_linear"], PROCESSES["vp_cosine"], VP("linear", 0.001, 0.2, 100)],
    ids=["linear", "scaled_linear", "cosine", "hundred_steps"],
)
def test_vp_equals_the_diffusers_table_at_training_steps(process):
    from diffusers import DDPMScheduler

    steps = process.num_train_steps
    stock = DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=process.schedule,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
    )
    t = (torch.arange(steps).double() + 1) / steps
    # The stock table is a float32 running product: 1000 roundings of 6e-8 each, and 6e-5 once where 1 - beta = 0.001.
    np.testing.assert_allclose(process.alpha(t) ** 2, stock.alphas_cumprod.double(), rtol=1.2e-4)
    np.testing.assert_allclose(process.alpha(t)[:-1] ** 2, stock.alphas_cumprod.double()[:-1], rtol=6e-5)


@GAUSSIAN
def test_floats_and_tensors_agree(process):
    t = torch.linspace(0, 1, 24, dtype=torch.float64).view(4, 6)
    for function in (process.alpha, process.sigma, process.lam, process.model_time):
        result = function(t)
        assert result.dtype == torch.float64
        assert result.shape == t.shape
        one_by_one = [function(float(v)) for v in t.flatten()]
        assert all(isinstance(v, float) for v in one_by_one)
        assert result.flatten().tolist() == one_by_one
    lam = torch.linspace(-5, 5, 7, dtype=torch.float64)
    assert process.time(lam).tolist() == [process.time(float(v)) for v in lam]


@GAUSSIAN
def test_a_float32_tensor_is_computed_in_float64(process):
    t = torch.tensor([0.25, 0.5], dtype=torch.float32)
    assert process.sigma(t).tolist() == [process.sigma(0.25), process.sigma(0.5)]


def test_model_time_is_what_each_network_was_trained_with():
    assert VP().model_time(1.0) == 999.0
    assert VP().model_time(1 / 1000) == 0.0
    assert VP().model_time(0.0) == 0.0  # clamped: there is no step -1
    assert VP().model_time(0.2505) == pytest.approx(249.5)
    assert EDM().model_time(0.5) == 40.0
    assert Flow().model_time(0.5) == 500.0


def test_the_first_trained_time_is_t_min():
    assert VP().model_time(VP().t_min) == 0.0
    assert EDM().sigma(EDM().t_min) == pytest.approx(0.002)
    assert Flow().model_time(Flow().t_min) == 1.0


def test_an_unknown_beta_schedule_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="unknown beta schedule 'sigmoid'; allowed: linear, scaled_linear"):
        VP("sigmoid").alpha(0.5)


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "edm"])
def test_ode_coordinates_are_the_scaled_noise_level(name):
    process = PROCESSES[name]
    scale, u = process.ode(0.4)
    assert scale == process.alpha(0.4)
    assert u == pytest.approx(math.exp(-process.lam(0.4)), rel=1e-12)


def test_ode_coordinates_of_a_flow_are_finite_at_its_start():
    assert Flow().ode(1.0) == (1.0, 1.0)


# --- prior and forward process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "t", "std"),
    [(VP(), 1.0, 1.0), (VP(), 0.5, 1.0), (EDM(), 1.0, 80.0), (EDM(), 0.1, 8.0), (Flow(), 1.0, 1.0), (Flow(), 0.5, 0.5)],
)
def test_prior_is_normal_with_the_stated_deviation(process, t, std):
    rows, width = 4000, 5
    x = process.prior((width,), noise_of(rows), t).numpy()
    assert process.prior_std(t) == pytest.approx(std)
    count = rows * width
    assert abs(x.mean()) < 5 * std / math.sqrt(count)
    assert abs(x.var() / std**2 - 1) < 5 * math.sqrt(2 / count)  # the variance of a normal has SE sqrt(2 / n)


@GAUSSIAN
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)])
def test_renoise_has_the_marginal_of_the_noisier_time(process, s, t):
    rows, x0 = 40_000, 0.7
    noise = noise_of(rows)
    start = process.alpha(s) * x0 + process.sigma(s) * noise.normal((1,), "start")
    x = process.renoise(start, s, t, noise).numpy()
    std = process.sigma(t)
    assert abs(x.mean() - process.alpha(t) * x0) < 5 * std / math.sqrt(rows)
    assert abs(x.var() / std**2 - 1) < 5 * math.sqrt(2 / rows)


@GAUSSIAN
def test_renoise_to_the_same_time_changes_nothing(process):
    x = noise_of(16).normal((3,), "x")
    torch.testing.assert_close(process.renoise(x, 0.4, 0.4, noise_of(16)), x, rtol=0, atol=1e-7)


@GAUSSIAN
def test_readout_of_a_gaussian_process_is_the_mean_itself(process):
    x0 = noise_of(4).normal((3,), "x")
    assert process.readout(x0, noise_of(4)) is x0


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_masked_prior_is_all_masks():
    x = Masked(5).prior((7,), noise_of(3))
    assert x.shape == (3, 7)
    assert x.dtype == torch.int64
    assert (x == 5).all()


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.4, 1.0)])
def test_masked_renoise_masks_at_the_stated_rate_and_changes_no_token(s, t):
    process, rows, length = Masked(3), 5000, 4
    x = torch.randint(0, 3, (rows, length), generator=torch.Generator().manual_seed(0))
    x[:, 0] = process.mask
    out = process.renoise(x, s, t, noise_of(rows))
    masked = out == process.mask
    assert (out[~masked] == x[~masked]).all()
    assert masked[:, 0].all()
    rate, count = 1 - (1 - t) / (1 - s), rows * (length - 1)
    share = masked[:, 1:].double().mean().item()
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / count)


def test_masked_readout_draws_each_position_from_its_own_probabilities():
    rows = 20_000
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.0, 1.0, 0.0], [0.5, 0.25, 0.25]], dtype=torch.float64)
    out = Masked(3).readout(probabilities.expand(rows, 3, 3), noise_of(rows))
    assert out.shape == (rows, 3)
    share = torch.nn.functional.one_hot(out, 3).double().mean(0)
    error = (share - probabilities).abs()
    assert (error <= 5 * torch.sqrt(probabilities * (1 - probabilities) / rows)).all()
    # Positions have draws of their own: agreement of 0 and 2 is that of independent draws.
    both = probabilities[0] @ probabilities[2]
    agree = (out[:, 0] == out[:, 2]).double().mean()
    assert abs(agree - both) < 5 * math.sqrt(both * (1 - both) / rows)


def test_categorical_inverts_the_cumulative_distribution():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([2.0**-54, 0.125, 0.25, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert categorical(p.expand(6, 6), u).tolist() == [1, 1, 3, 3, 4, 4]


def test_categorical_takes_unnormalised_weights():
    u = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    assert categorical(torch.tensor([2.0, 6.0]).expand(3, 2), u).tolist() == [0, 1, 1]


def test_categorical_frequencies_match_over_many_classes():
    rows, p = 200_000, np.random.default_rng(1).dirichlet(np.full(20, 0.5))
    u = noise_of(rows).uniform((), "u")
    counts = torch.bincount(categorical(torch.from_numpy(p).expand(rows, 20), u), minlength=20).numpy()
    assert (np.abs(counts / rows - p) <= 5 * np.sqrt(p * (1 - p) / rows)).all()


# --- predictions -----------------------------------------------------------------------------------------------------


def to_eps(kind, x, y, alpha, sigma):
    """The noise that prediction ``y = a eps + b x0`` implies where ``x = alpha x0 + sigma eps``."""
    weights = {"epsilon": (1, 0), "sample": (0, 1), "v_prediction": (alpha, -sigma), "flow": (1, -1)}
    a, b = (weights | {"score": (-1 / sigma, 0)})[kind]
    return (alpha * y - b * x) / (a * alpha - b * sigma)


@GAUSSIAN
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.02, 0.5, 0.9])
def test_predictions_convert_back_and_forth(process, kind, t):
    alpha, sigma = process.alpha(t), process.sigma(t)
    noise = noise_of(32)
    x0, eps = noise.normal((4,), "x0"), noise.normal((4,), "eps")
    x = alpha * x0 + sigma * eps
    y = from_x0(kind, x, x0, alpha, sigma)
    scale = max(1.0, alpha / sigma, sigma / alpha)
    torch.testing.assert_close(to_x0(kind, x, y, alpha, sigma), x0, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(to_eps(kind, x, y, alpha, sigma), eps, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(from_x0(kind, x, to_x0(kind, x, y, alpha, sigma), alpha, sigma), y, rtol=0, atol=1e-9)


@GAUSSIAN
def test_predictions_are_the_textbook_targets(process):
    alpha, sigma = process.alpha(0.6), process.sigma(0.6)
    noise = noise_of(8)
    x0, eps = noise.normal((4,), "x0"), noise.normal((4,), "eps")
    x = alpha * x0 + sigma * eps
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(from_x0("epsilon", x, x0, alpha, sigma), eps, **close)
    torch.testing.assert_close(from_x0("sample", x, x0, alpha, sigma), x0, **close)
    torch.testing.assert_close(from_x0("v_prediction", x, x0, alpha, sigma), alpha * eps - sigma * x0, **close)
    torch.testing.assert_close(from_x0("flow", x, x0, alpha, sigma), eps - x0, **close)
    torch.testing.assert_close(from_x0("score", x, x0, alpha, sigma), -eps / sigma, **close)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow"])
def test_predictions_that_see_the_data_define_it_at_pure_noise(kind):
    noise = noise_of(8)
    x0, eps = noise.normal((4,), "x0"), noise.normal((4,), "eps")
    y = from_x0(kind, eps, x0, 0.0, 1.0)
    torch.testing.assert_close(to_x0(kind, eps, y, 0.0, 1.0), x0, rtol=0, atol=1e-12)


def test_an_unknown_prediction_is_refused_with_the_allowed_ones():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown prediction 'velocity'; allowed: epsilon, sample, v_prediction"):
        to_x0("velocity", x, x, 0.5, 0.5)


@GAUSSIAN
def test_transfer_follows_the_line_of_its_prediction(process):
    noise = noise_of(8)
    x0, eps = noise.normal((4,), "x0"), noise.normal((4,), "eps")
    t, s = 0.7, 0.3
    x = process.alpha(t) * x0 + process.sigma(t) * eps
    moved = transfer(process, x, x0, t, s)
    torch.testing.assert_close(moved, process.alpha(s) * x0 + process.sigma(s) * eps, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(transfer(process, x, x0, t, 0.0), x0, rtol=0, atol=1e-15)


# --- grids -----------------------------------------------------------------------------------------------------------

GRIDS = ["uniform", "quadratic", "karras", "logsnr"]


@GAUSSIAN
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
def test_grids_fall_from_one_to_zero_in_the_stated_number_of_steps(process, name, num_steps):
    grid = times_registry.build({"name": name, "num_steps": num_steps})(process)
    assert len(grid) == num_steps + 1
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert (np.diff(grid) < 0).all()


def test_quadratic_with_power_one_is_uniform():
    for steps in (1, 3, 10):
        quadratic = times_registry.build({"name": "quadratic", "num_steps": steps, "power": 1.0})
        assert quadratic(VP()) == times_registry.build({"name": "uniform", "num_steps": steps})(VP())


def test_uniform_is_the_trailing_spacing_of_diffusers():
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(8)
    grid = times_registry.build({"name": "uniform", "num_steps": 8})(VP())
    assert [VP().model_time(t) for t in grid[:-1]] == pytest.approx(stock.timesteps.tolist())


def test_karras_on_edm_is_the_published_formula():
    n, rho, low, high = 18, 7.0, 0.002, 80.0
    i = np.arange(n)
    sigmas = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    grid = times_registry.build({"name": "karras", "num_steps": n})(EDM())
    np.testing.assert_allclose([EDM().sigma(t) for t in grid], [*sigmas, 0.0], rtol=1e-9)


@GAUSSIAN
def test_logsnr_nodes_are_equally_spaced(process):
    grid = times_registry.build({"name": "logsnr", "num_steps": 9})(process)
    inner = grid[1:-1] if isinstance(process, Flow) else grid[:-1]  # the log-SNR of a flow is not finite at t=1
    steps = np.diff([process.lam(t) for t in inner])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert grid[-2] == pytest.approx(process.t_min, rel=1e-9)


def test_ratios_multiply_up():
    grid = times_registry.build({"name": "ratios", "ratios": [0.5, 0.5, 0.8]})(VP())
    assert grid == pytest.approx((1.0, 0.5, 0.25, 0.2, 0.0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "uniform", "num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"name": "quadratic", "power": 0.0}, "power must be positive, got 0.0"),
        ({"name": "karras", "rho": -1.0}, "rho > 0"),
        ({"name": "ratios", "ratios": [0.5, 1.0]}, "strictly between 0 and 1"),
        ({"name": "explicit", "values": [1.0, 0.5, 0.5, 0.0]}, "strictly decreasing"),
        ({"name": "explicit", "values": [1.2, 0.0]}, r"must lie in \[0, 1\]"),
        ({"name": "explicit", "values": [1.0]}, "two or more"),
    ],
)
def test_grids_refuse_impossible_fields(spec, message):
    with pytest.raises(ValueError, match=message):
        times_registry.build(spec)
