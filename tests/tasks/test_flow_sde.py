"""The stochastic twin of a rectified flow: the published variances, its window, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.sampler import Sampler

MEAN, VARIANCE = 0.6, 0.25
MODEL = GMM(process="flow", means=((MEAN,),), covariances=(math.sqrt(VARIANCE),)).load("cpu")


def flow_sde(**fields):
    return registry.solvers.build({"name": "flow_sde"} | fields)


def uniform(num_steps, stop=0.0):
    return tuple(float(t) for t in np.linspace(1.0, stop, num_steps + 1))


class Given:
    """Hands out the same number to every row at one step, and 0 at the others."""

    num_rows = 1

    def __init__(self, at=None, value=0.0, prior=0.0):
        self.place, self.value, self.prior, self.step = at, value, prior, None

    def at(self, step):
        found = Given(self.place, self.value, self.prior)
        found.step = step
        return found

    def normal(self, shape, purpose):
        size = self.prior if purpose == "prior" else self.value if self.step == self.place else 0.0
        return torch.full((1, *shape), size, dtype=torch.float64)


def moments(solver, num_steps):
    """Mean and variance of the end on Gaussian data, exactly: the end is linear in every draw."""
    times = uniform(num_steps)

    def end(noise):
        return float(Sampler(MODEL, solver, times).run(noise).x)

    mean = end(Given())
    steps = range(num_steps) if solver.stochastic else ()
    factors = [end(Given(prior=1.0)) - mean, *(end(Given(i, 1.0)) - mean for i in steps)]
    return mean, sum(f**2 for f in factors)


def unified(**fields):
    return registry.solvers.build({"name": "unified", "preset": "ddim"} | fields)


TABLE = [
    ("euler", {"eta": 0.0}, {10: 0.186, 25: 0.222, 200: 0.246}),
    ("grpo", {"eta": 0.7}, {10: 0.230, 25: 0.244, 200: 0.251}),
    ("dance", {"eta": 0.7, "diffusion": "constant"}, {10: 0.225, 25: 0.239, 200: 0.249}),
]


@pytest.mark.parametrize(("name", "fields", "published"), TABLE, ids=[row[0] for row in TABLE])
def test_the_variance_of_a_gaussian_is_the_published_table(name, fields, published):
    for steps in (10, 25) if name != "euler" else published:
        mean, variance = moments(flow_sde(**fields), steps)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        # The notes' numbers are simulated: ours are .186 .222 .246, .230 .244, .222 .239.
        assert variance == pytest.approx(published[steps], abs=4e-3)


@pytest.mark.parametrize(
    ("fields", "published"), [({"eta": 0.7}, 0.251), ({"eta": 0.7, "diffusion": "constant"}, 0.249)]
)
def test_with_many_steps_the_variance_is_nearly_that_of_the_data(fields, published):
    rows = 20_000
    x = Sampler(MODEL, flow_sde(**fields), uniform(200)).run(noise_of(rows)).x.numpy()
    assert abs(x.var() - published) < 5 * published * math.sqrt(2 / rows) + 5e-4
    assert abs(x.mean() - MEAN) < 5 * math.sqrt(published / rows)


@pytest.mark.parametrize(("kappa", "published"), [(0.5, {10: 0.175, 200: 0.245}), (1.0, {10: 0.149, 200: 0.242})])
def test_exact_exponential_steps_have_the_published_variances_too(kappa, published):
    assert moments(unified(kappa=kappa), 10)[1] == pytest.approx(published[10], abs=1e-3)
    assert moments(unified(kappa=kappa), 40)[1] > published[10]
    rows = 20_000
    x = Sampler(MODEL, unified(kappa=kappa), uniform(200)).run(noise_of(rows)).x.numpy()
    assert abs(x.var() - published[200]) < 5 * 0.25 * math.sqrt(2 / rows) + 5e-4


def noise_of(rows):
    return RowNoise(0, torch.arange(rows), dtype=torch.float64)


def test_the_first_step_inflates_the_variance_and_the_inflation_falls_with_its_size():
    # By about eta^4 sigma_1^2 / 4 at the step itself: sigma_1 / (1 - sigma_1) is eta's factor there.
    def variance_after_one(steps, eta=0.7):
        times = uniform(steps)[:3]
        sampler = Sampler(MODEL, flow_sde(eta=eta), times)

        def after(noise):
            return float(sampler.step(sampler.start(noise), noise).x)

        mean = after(Given())
        return sum((after(n) - mean) ** 2 for n in (Given(prior=1.0), Given(0, 1.0)))

    gaps = []
    for steps in (25, 100):
        s = uniform(steps)[1]
        gaps.append(variance_after_one(steps) - ((1 - s) ** 2 * VARIANCE + s**2))
    assert 0.03 < gaps[1] < gaps[0] < 0.1
    assert gaps[1] == pytest.approx(0.7**4 / 4, rel=0.1)


def test_one_step_is_the_published_formula():
    x, t, s, eta = torch.tensor([[0.3], [-1.2]], dtype=torch.float64), 0.6, 0.5, 0.9
    u = (x - MODEL.denoise(x, t)) / t
    for diffusion, g in (("grpo", eta * math.sqrt(t / (1 - t))), ("constant", eta)):
        sampler = Sampler(MODEL, flow_sde(eta=eta, diffusion=diffusion), (t, s, 0.0))
        noise = noise_of(2)
        state = sampler.start(noise)
        dt, z = s - t, noise.at(0).normal((1,), "step")
        mean = x * (1 + g**2 * dt / (2 * t)) + u * (1 + g**2 * (1 - t) / (2 * t)) * dt
        found = sampler.step(type(state)(x, None, state.memory, 0), noise).x
        torch.testing.assert_close(found, mean + g * math.sqrt(-dt) * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diffusion", ["grpo", "constant"])
def test_with_eta_zero_it_is_euler(diffusion):
    model, times = GMM(process="flow").load("cpu"), uniform(9)
    ours = Sampler(model, flow_sde(eta=0.0, diffusion=diffusion), times).run(noise_of(16)).x
    assert torch.equal(ours, Sampler(model, registry.solvers.build("euler"), times).run(noise_of(16)).x)
    assert not flow_sde(eta=0.0).stochastic and flow_sde(eta=0.7).stochastic


@pytest.mark.parametrize("window", [(0, 3), (2, 5), (4, 4), None])
def test_only_steps_inside_the_window_draw_noise(window):
    steps, solver = 8, flow_sde(window=None if window is None else list(window))
    times = uniform(steps)
    sampler = Sampler(MODEL, solver, times)
    euler = registry.solvers.build("euler")
    state = sampler.start(noise_of(6))
    for i in range(steps):
        after = sampler.step(state, noise_of(6))
        plain = euler.step(_Conditioned(), state, times[i], times[i + 1], None)
        inside = i < steps - 1 if window is None else window[0] <= i < window[1]
        assert torch.equal(after.x, plain.x) != inside
        state = after


class _Conditioned:
    process = MODEL.process

    def denoise(self, x, t):
        return MODEL.denoise(x, t)


def test_an_empty_window_is_euler_bit_for_bit_and_the_last_step_is_never_inside():
    times = uniform(6)
    for window in ([0, 0], [3, 3]):
        ours = Sampler(MODEL, flow_sde(window=window), times).run(noise_of(8)).x
        assert torch.equal(ours, Sampler(MODEL, registry.solvers.build("euler"), times).run(noise_of(8)).x)
    flow_sde(window=[1, 5]).check(MODEL.process, times)
    with pytest.raises(ValueError, match="solver.window must end by step 5, got \\[1, 6\\]"):
        flow_sde(window=[1, 6]).check(MODEL.process, times)


@pytest.mark.parametrize("process", ["vp", "edm"])
def test_processes_that_are_no_flows_are_refused(process):
    recipe = Recipe({"name": "gmm", "process": process}, "flow_sde", "uniform", "none", "single").completed()
    with pytest.raises(ValueError, match="flow_sde steps rectified flows, but the process is"):
        recipe.check()


@pytest.mark.parametrize(
    "fields", [{"eta": -0.1}, {"diffusion": "other"}, {"window": [3, 2]}, {"window": [1]}, {"window": [-2, 2]}], ids=str
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError, match="flow_sde needs|unknown diffusion"):
        flow_sde(**fields)
