"""Momentum: GHVB's weights, its stability and order, heavy ball on any multistep solver, and what both are for.

The toy is a mixture in one dimension on the linear-beta VP process from t=1 to 0.05, equally spaced in log-SNR.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.polynomial import polynomial as poly
from scipy.integrate import solve_ivp

from tasks import registry
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.processes import EDM
from tasks.sampler import Sampler
from tasks.solvers.ghvb import ghvb_weights
from tasks.types import State

BETAS = [1.0, 0.8, 0.5, 0.3]


def noise_of(rows=64):
    return RowNoise(0, torch.arange(rows), dtype=torch.float64)


def ghvb(order, beta):
    return registry.solvers.build({"name": "ghvb", "max_order": order, "beta": beta})


def unified(**fields):
    return registry.solvers.build({"name": "unified"} | fields)


def heavy_ball(preset, beta, **fields):
    return unified(preset=preset, hooks=[{"name": "heavy_ball", "beta": beta}], **fields)


def logsnr(process, num_steps, start=1.0, stop=0.05):
    lams = np.linspace(process.lam(start), process.lam(stop), num_steps + 1)
    return (start, *(process.time(float(lam)) for lam in lams[1:-1]), stop)


def end_of(model, solver, times, rows=64, cond=None):
    return Sampler(model, solver, tuple(times), cond).run(noise_of(rows)).x


@pytest.fixture(scope="module")
def toy():
    """The model, its grids, and where 64 trajectories of its probability-flow ODE really end."""
    model = GMM(weights=(0.3, 0.7), means=((-1.0,), (0.8,)), covariances=(0.4, 0.5)).load("cpu")
    p = model.process
    x = p.prior((1,), noise_of().at(-1), 1.0)

    def slope(u, y):  # y = x / alpha over u = sigma / alpha
        t = p.time(-math.log(u))
        state = p.alpha(t) * torch.from_numpy(y)[:, None]
        return ((state - p.alpha(t) * model.denoise(state, t)) / p.sigma(t))[:, 0].numpy()

    span = [p.sigma(t) / p.alpha(t) for t in (1.0, 0.05)]
    run = solve_ivp(slope, span, (x / p.alpha(1.0))[:, 0].numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    end = p.alpha(0.05) * torch.from_numpy(run.y[:, -1:])

    def error(solver, num_steps):
        return float((end_of(model, solver, logsnr(p, num_steps)) - end).square().mean().sqrt())

    return SimpleNamespace(model=model, error=error)


def slope_of(toy, solver, counts):
    return -np.polyfit(np.log(counts), np.log([toy.error(solver, n) for n in counts]), 1)[0]


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_weights_of_order_two_are_the_closed_form(beta):
    np.testing.assert_allclose(ghvb_weights(2, beta), [(2 + beta) / (2 * beta), -(2 - beta) / (2 * beta)], rtol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("beta", BETAS)
def test_the_weights_are_the_truncated_product_of_two_series_in_the_backward_difference(order, beta):
    adams = [1, 1 / 2, 5 / 12, 3 / 8, 251 / 720]
    series = poly.polymul([1, (1 - beta) / beta], adams)[:order]
    # nabla = 1 - shift; the coefficient of shift^j multiplies v_{n-j}.
    expected = np.zeros(order)
    for k, coefficient in enumerate(series):
        expected[: k + 1] += coefficient * poly.polypow([1, -1], k)
    np.testing.assert_allclose(ghvb_weights(order, beta), expected, rtol=1e-13)
    assert sum(ghvb_weights(order, beta)) == pytest.approx(1, abs=1e-12)


def test_with_beta_one_the_weights_are_those_of_adams_and_bashforth():
    assert ghvb_weights(3, 1.0) == pytest.approx([23 / 12, -16 / 12, 5 / 12])
    assert ghvb_weights(4, 1.0) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_with_beta_one_it_is_plms(process, order):
    model = GMM(process=process).load("cpu")
    times = registry.times.build({"name": "uniform", "num_steps": 12})(model.process)
    ours = end_of(model, ghvb(order, 1.0), times)
    torch.testing.assert_close(
        ours, end_of(model, unified(preset="f_pndm", max_order=order), times), rtol=0, atol=1e-11
    )


def test_with_order_one_and_beta_one_it_is_euler():
    model = GMM().load("cpu")
    times = logsnr(model.process, 9)
    euler = registry.solvers.build("euler")
    torch.testing.assert_close(end_of(model, ghvb(1, 1.0), times), end_of(model, euler, times), rtol=0, atol=1e-12)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ghvb_is_of_order_two_at_most_on_an_uneven_grid(toy, order, beta):
    # Measured .99 for r=1 and 1.91 to 2.04 for the others (r=3, beta=.5 reaches its slope last).
    slope = slope_of(toy, ghvb(order, beta), (40, 80, 160) if order < 3 else (80, 160))
    assert slope == pytest.approx(min(order, 2), abs=0.15)
    assert ghvb(order, beta).order == min(order, 2)


@pytest.mark.parametrize("preset", ["ddim", "dpmpp_2m", "dpmpp_3m", "deis", "velocity_2m"])
@pytest.mark.parametrize("beta", [0.8, 0.5])
def test_heavy_ball_is_of_first_order(toy, preset, beta):
    # Measured .97 to 1.02 over the last doubling.
    assert slope_of(toy, heavy_ball(preset, beta), (160, 320)) == pytest.approx(1, abs=0.05)


# --- stability -------------------------------------------------------------------------------------------------------

LIMITS = {  # of h k for y' = -k y, as published in the notes
    (1, 1.0): 2.0, (1, 0.8): 3.0, (1, 0.5): 6.0, (2, 1.0): 1.0, (2, 0.8): 1.2, (2, 0.5): 1.5,
    (3, 1.0): 0.54, (3, 0.8): 0.64, (3, 0.5): 0.78, (4, 1.0): 0.30, (4, 0.8): 0.35, (4, 0.5): 0.42,
}  # fmt: skip


class Linear:
    """A model whose noise prediction is k x, so that the ODE over sigma is dy / dsigma = k y."""

    shape, num_classes = (1,), 0

    def __init__(self, k):
        self.k, self.process = k, EDM(sigma_max=1.0)

    def denoise(self, x, t, cond=None):
        return x - t * self.k * x


def growth(solver, hk, steps=800):
    """By what factor a step multiplies the solution in the end, on sigma from 1 to 1/2 in equal steps."""
    h = 0.5 / steps
    model = Linear(hk / h)
    sampler = Sampler(model, solver, tuple(1.0 - h * i for i in range(steps + 1)))
    state = State(torch.ones(1, 1, dtype=torch.float64))
    sizes = []
    while state.step < steps and (not sizes or 1e-60 < sizes[-1] < 1e60):
        state = sampler.step(state, noise_of(1))
        sizes.append(float(state.x.abs()))
    return max(sizes[-1], 1e-300) ** (1 / len(sizes))


@pytest.mark.parametrize(("order", "beta"), list(LIMITS))
def test_real_axis_stability_ends_where_the_table_says(order, beta):
    limit = LIMITS[order, beta]
    # The table has two digits (r=1 has exact values 2 (2 - beta) / beta).
    assert growth(ghvb(order, beta), 0.97 * limit) < 1
    assert growth(ghvb(order, beta), 1.03 * limit) > 1


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_a_smaller_beta_is_stable_further(order):
    def limit(beta):
        low, high = 0.05, 20.0
        for _ in range(40):  # roots of z^r (z - 1) (1 - (1 - beta) / z) + h k beta sum_j w_j z^(r - j)
            middle = (low + high) / 2
            weights = np.array(ghvb_weights(order, beta))
            left = np.convolve([1, -1], [1, -(1 - beta)])
            left = np.append(left, np.zeros(max(0, order - 2) + (order == 1) * 0))
            right = np.append(middle * beta * weights, np.zeros(len(left) - 1 - order))
            left[1:] += right
            low, high = (middle, high) if np.abs(np.roots(left)).max() <= 1 + 1e-9 else (low, middle)
        return low

    limits = [limit(beta) for beta in BETAS]
    assert limits == sorted(limits)
    for beta, found in zip(BETAS, limits, strict=True):
        if (order, beta) in LIMITS:
            assert found == pytest.approx(LIMITS[order, beta], abs=0.03)


# --- what it is for --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided():
    """A labelled mixture under a guidance scale of 30 from t=1 to 0.05, and where 1000 steps end."""
    model = registry.guidance.build({"name": "cfg", "scale": 30.0}).wrap(GMM(labels=True).load("cpu"))
    cond, p = torch.arange(64) % 3, model.process
    end = end_of(model, registry.solvers.build("dpmpp_2m"), logsnr(p, 1000), cond=cond)

    def error(solver, num_steps):
        return float((end_of(model, solver, logsnr(p, num_steps), cond=cond) - end).square().mean().sqrt())

    return error


def test_ghvb_removes_the_divergence_of_plms_at_large_guidance(guided):
    # At 15 steps the fourth-order rule is unstable (56); the same rule with momentum is not (.09, .04).
    assert guided(unified(preset="f_pndm"), 15) > 10
    assert guided(ghvb(4, 1.0), 15) > 10
    assert guided(ghvb(4, 0.5), 15) < 0.2
    assert guided(ghvb(4, 0.3), 15) < 0.1
    # At 8 steps so is the second-order one (22), and DPM-Solver++ 2M (22).
    assert guided(unified(preset="f_pndm", max_order=2), 8) > 10
    assert guided(unified(preset="dpmpp_2m"), 8) > 10
    assert guided(ghvb(2, 0.3), 8) < 0.5


def test_heavy_ball_removes_it_too_at_the_price_of_order(guided):
    assert guided(unified(preset="f_pndm"), 8) > 100
    assert guided(heavy_ball("f_pndm", 0.5), 8) < 2
    # Where the base is stable the momentum costs accuracy.
    assert guided(heavy_ball("dpmpp_2m", 0.5), 40) > 3 * guided(unified(preset="dpmpp_2m"), 40)


# --- heavy ball as a hook --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis", "f_pndm", "velocity_2m"])
def test_heavy_ball_with_beta_one_is_its_base_bit_for_bit(preset):
    model = GMM().load("cpu")
    times = registry.times.build({"name": "uniform", "num_steps": 8})(model.process)
    assert torch.equal(end_of(model, heavy_ball(preset, 1.0), times), end_of(model, unified(preset=preset), times))
    assert not torch.equal(end_of(model, heavy_ball(preset, 0.9), times), end_of(model, unified(preset=preset), times))


@pytest.mark.parametrize("beta", [0.8, 0.4])
def test_heavy_ball_averages_the_directions(beta):
    model = GMM().load("cpu")
    times, p = logsnr(model.process, 3), model.process
    x = p.prior((2,), noise_of().at(-1), 1.0)
    v = None
    for t, s in zip(times, times[1:], strict=False):  # DDIM in x0 form: x_s = ratio x + total u
        u = model.denoise(x, t)
        v = u if v is None else (1 - beta) * v + beta * u
        ratio = p.sigma(s) / p.sigma(t)
        x = ratio * x + (p.alpha(s) - p.alpha(t) * ratio) * v
    torch.testing.assert_close(end_of(model, heavy_ball("ddim", beta), times), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{"preset": "dpmpp_2s"}, {"steps": [{"order": 1}, {"prediction": "eps"}]}])
def test_heavy_ball_refuses_blocks_and_mixed_predictions(fields):
    solver = unified(hooks=[{"name": "heavy_ball"}], **fields)
    with pytest.raises(ValueError, match="heavy_ball needs multistep updates of one prediction"):
        solver.check(GMM().noising, (1.0, 0.5, 0.1))


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.1])
def test_beta_must_be_a_share(beta):
    with pytest.raises(ValueError, match="beta"):
        ghvb(2, beta)
    with pytest.raises(ValueError, match="beta"):
        heavy_ball("ddim", beta)
