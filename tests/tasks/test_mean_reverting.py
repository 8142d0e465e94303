"""The mean-reverting process and the exact restoration model: schedule, published steps, posteriors and PSNR."""

import json
import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.data import digits
from tasks.mean_reverting import MeanReverting
from tasks.mixtures import fit_digits
from tasks.models.gmm import GMM
from tasks.models.restore import Restore
from tasks.noise import RowNoise
from tasks.processes import transfer
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedModel, Sampler
from tasks.types import State

PROCESSES = {
    "cosine": MeanReverting(),
    "constant": MeanReverting(schedule="constant"),
    "other": MeanReverting(sigma_inf=0.9, delta=0.05, num_train_steps=30),
}
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
DENSE = np.linspace(0.0, 1.0, 1025)
TASKS = {
    "inpaint": Restore(),
    "centre": Restore(block="centre"),
    "denoise": Restore(task="denoise"),
    "super_resolve": Restore(task="super_resolve"),
    "noiseless": Restore(noise_std=0.0),
}
EVERY_TASK = pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS.keys())


def noise_of(rows, seed=0):
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def run(spec, model, times, rows, cond=None):
    sampler = Sampler(CountedModel(model, 10**6), registry.solvers.build(spec), tuple(times), cond)
    return sampler.run(noise_of(rows)).x


# --- schedule --------------------------------------------------------------------------------------------------------


@EVERY
def test_time_inverts_lam(process):
    for t in [*DENSE[1:], 1e-9, 1e-6, 1e-3, 1 - 1e-9]:
        assert process.time(process.lam(float(t))) == pytest.approx(t, rel=1e-12)
    assert process.time(math.inf) == 0.0
    assert process.time(process.lam(1.0) - 3.0) == 1.0


@EVERY
def test_lam_falls_from_clean_data_to_the_last_trained_time(process):
    lam = np.array([process.lam(float(t)) for t in DENSE[1:]])
    ratio = np.array([math.log(process.alpha(float(t)) / process.sigma(float(t))) for t in DENSE[1:]])
    np.testing.assert_allclose(lam, ratio, rtol=1e-12, atol=1e-12)
    assert (np.diff(lam) < 0).all()
    assert (process.alpha(0.0), process.sigma(0.0), process.lam(0.0)) == (1.0, 0.0, math.inf)
    assert process.alpha(1.0) == pytest.approx(process.delta, rel=1e-14)
    assert process.prior_std() == pytest.approx(process.sigma_inf, rel=process.delta**2)


@EVERY
def test_the_noise_is_what_the_decay_leaves_of_the_stationary_one(process):
    t = torch.from_numpy(DENSE)
    total = (process.sigma(t) / process.sigma_inf) ** 2 + process.alpha(t) ** 2
    np.testing.assert_allclose(total, 1.0, rtol=1e-14)


@EVERY
def test_floats_and_tensors_agree(process):
    t = torch.linspace(0, 1, 24, dtype=torch.float64).view(4, 6)
    for function in (process.alpha, process.sigma, process.lam, process.model_time):
        assert function(t).flatten().tolist() == [function(float(v)) for v in t.flatten()]
    lam = torch.linspace(-5, 5, 7, dtype=torch.float64)
    assert process.time(lam).tolist() == [process.time(float(v)) for v in lam]


@EVERY
def test_alpha_solves_the_equation_of_its_theta(process):
    # d log alpha / dt = -theta, and theta is the published shape times one constant.
    t, h = np.linspace(0.02, 0.98, 25), 1e-5
    slope = np.array([math.log(process.alpha(v - h) / process.alpha(v + h)) / (2 * h) for v in t])
    shape = np.ones_like(t)
    if process.schedule == "cosine":
        bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        shape = 1 - bar / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(slope / shape, (slope / shape)[-1], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [100, 10_000])
def test_the_published_table_tends_to_the_schedule(schedule, steps):
    nodes = np.arange(steps + 3) / (steps + 2)
    bar = np.cos((nodes + 0.008) / 1.008 * math.pi / 2) ** 2
    thetas = 1 - bar[1:-1] / bar[0] if schedule == "cosine" else np.ones(steps + 1)
    total = np.cumsum(thetas) - thetas[0]
    alpha = np.exp(math.log(0.005) * total / total[-1])
    process = MeanReverting(schedule=schedule, num_train_steps=steps)
    found = process.alpha(torch.arange(steps + 1).double() / steps).numpy()
    assert np.abs(found - alpha).max() < (2.0 / steps if schedule == "cosine" else 1e-12)
    assert process.model_time(0.25) == steps / 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "sine"}, "unknown theta schedule 'sine', did you mean 'cosine'"),
        ({"sigma_inf": 0.0}, "sigma_inf must be positive, got 0.0"),
        ({"delta": 1.0}, "delta must lie strictly between 0 and 1, got 1.0"),
        ({"num_train_steps": 0}, "num_train_steps must be at least 1, got 0"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MeanReverting(**fields)


# --- the forward process ---------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)])
def test_renoise_has_the_marginal_of_the_noisier_time(process, s, t):
    rows, x0 = 40_000, 0.7
    noise = noise_of(rows)
    start = process.alpha(s) * x0 + process.sigma(s) * noise.normal((1,), "start")
    x, std = process.renoise(start, s, t, noise).numpy(), process.sigma(t)
    assert abs(x.mean() - process.alpha(t) * x0) < 5 * std / math.sqrt(rows)
    assert abs(x.var() / std**2 - 1) < 5 * math.sqrt(2 / rows)


def test_the_forward_equation_has_the_stated_moments():
    # Euler-Maruyama of dx = theta (mu - x) dt + sqrt(2 theta) sigma_inf dw as an exact recursion of mean and variance.
    process, mu, x0, steps = PROCESSES["cosine"], 0.4, -0.6, 200_000
    decay = -np.log(process.alpha(torch.linspace(0, 0.7, steps + 1, dtype=torch.float64)).numpy())
    mean, variance = x0, 0.0
    for rate in np.diff(decay).tolist():
        mean, variance = mean + rate * (mu - mean), (1 - rate) ** 2 * variance + 2 * rate * process.sigma_inf**2
    alpha = process.alpha(0.7)
    assert mean == pytest.approx(alpha * x0 + (1 - alpha) * mu, abs=1e-4)
    assert variance == pytest.approx(process.sigma(0.7) ** 2, rel=1e-4)


# --- the published steps, in the coordinates of the image ------------------------------------------------------------


class Shifted:
    """A restoration model in its own coordinates x, with the degraded image mu, and both predictions."""

    def __init__(self, schedule):
        self.mu = torch.tensor([[0.5, -0.8]], dtype=torch.float64)
        self.model = GMM(process="mr").load("cpu")  # the law of x0 - mu
        self.model.process = self.process = MeanReverting(schedule=schedule)

    def clean(self, x, t):
        return self.model.denoise(x - self.mu, t) + self.mu

    def noise(self, x, t):
        alpha = self.process.alpha(t)
        return (x - alpha * self.clean(x, t) - (1 - alpha) * self.mu) / self.process.sigma(t)


class Fixed:
    def __init__(self, z):
        self.z = z

    def at(self, step):
        return self

    def normal(self, shape, purpose):
        return self.z


TIMES = (0.9, 0.6, 0.35, 0.1)


@pytest.fixture(params=["cosine", "constant"])
def shifted(request):
    return Shifted(request.param)


def steps_of(shifted, spec, z):
    """The states at TIMES in the coordinates of the image, by a solver that works on x - mu."""
    sampler = Sampler(shifted.model, registry.solvers.build(spec), TIMES)
    x = noise_of(16).normal((2,), "x") * 0.4
    state, states = State(x, None, sampler._memory(0), 0), [x]
    for _ in TIMES[1:]:
        state = sampler.step(state, Fixed(z))
        states.append(state.x)
    return [x + shifted.mu for x in states]


def pieces(shifted, i):
    p, t, s = shifted.process, TIMES[i], TIMES[i + 1]
    return p.alpha(t), p.sigma(t), p.alpha(s), p.sigma(s), p.lam(s) - p.lam(t)


CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def test_the_published_ode_step_is_ddim(shifted):
    states, mu = steps_of(shifted, {"name": "ddim"}, None), shifted.mu
    for i, t in enumerate(TIMES[:-1]):
        x, (alpha_t, sigma_t, alpha_s, sigma_s, h) = states[i], pieces(shifted, i)
        by_noise = alpha_s / alpha_t * x - sigma_s * math.expm1(h) * shifted.noise(x, t) + mu * (1 - alpha_s / alpha_t)
        ratio = sigma_s / sigma_t
        by_data = ratio * x - alpha_s * math.expm1(-h) * shifted.clean(x, t)
        by_data = by_data + mu * (1 - ratio + ratio * alpha_t - alpha_s)
        torch.testing.assert_close(states[i + 1], by_noise, **CLOSE)
        torch.testing.assert_close(states[i + 1], by_data, **CLOSE)


def test_the_published_second_order_ode_step_is_that_of_dpm_solver_pp(shifted):
    # The midpoint form of 2M: half of the published slope, with the weight of the prediction itself.
    states, mu = steps_of(shifted, {"name": "dpmpp_2m"}, None), shifted.mu
    for i, t in enumerate(TIMES[:-1]):
        x, (alpha_t, sigma_t, alpha_s, sigma_s, h) = states[i], pieces(shifted, i)
        ratio, d = sigma_s / sigma_t, shifted.clean(x, t)
        if i:
            r = pieces(shifted, i - 1)[4] / h
            d = d + (d - shifted.clean(states[i - 1], TIMES[i - 1])) / (2 * r)
        expected = ratio * x - alpha_s * math.expm1(-h) * d + mu * (1 - ratio + ratio * alpha_t - alpha_s)
        torch.testing.assert_close(states[i + 1], expected, **CLOSE)


def published_second_order(shifted, form, i, states):
    """x at TIMES[i + 1] by the published ODE step of order 2 in either form, from two states in image coordinates."""
    x, (alpha_t, sigma_t, alpha_s, sigma_s, h), mu = states[i], pieces(shifted, i), shifted.mu
    predict = shifted.clean if form == "data" else shifted.noise
    q = predict(x, TIMES[i])
    slope = (q - predict(states[i - 1], TIMES[i - 1])) * (h / pieces(shifted, i - 1)[4])
    if form == "data":
        phi_1 = math.expm1(-h)
        ratio = sigma_s / sigma_t
        combined = phi_1 * q - (phi_1 / h + 1) * slope
        return ratio * x - alpha_s * combined + mu * (1 - ratio + ratio * alpha_t - alpha_s)
    phi_1 = math.expm1(h)
    combined = phi_1 * q + (phi_1 / h - 1) * slope
    return alpha_s / alpha_t * x - sigma_s * combined + mu * (1 - alpha_s / alpha_t)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_the_published_second_order_ode_step_is_the_exponential_integrator(shifted, form):
    states = steps_of(shifted, {"name": "dpmpp_2m"}, None)  # any two states will do as a history
    p, (t0, t, s) = shifted.process, TIMES[:3]
    x0_hat = {v: shifted.clean(x, v) - shifted.mu for v, x in ((t0, states[0]), (t, states[1]))}
    h, back = p.lam(s) - p.lam(t), p.lam(t0) - p.lam(t)
    if form == "data":
        slope = (x0_hat[t0] - x0_hat[t]) / back
        moved = transfer(p, states[1] - shifted.mu, x0_hat[t], t, s)
        moved = moved + p.alpha(s) * h**2 * ((math.exp(-h) - 1 + h) / h**2) * slope
    else:
        eps = {v: (x - shifted.mu - p.alpha(v) * x0_hat[v]) / p.sigma(v) for v, x in ((t0, states[0]), (t, states[1]))}
        slope = (eps[t0] - eps[t]) / back
        moved = transfer(p, states[1] - shifted.mu, x0_hat[t], t, s)
        moved = moved - p.sigma(s) * h**2 * ((math.exp(h) - 1 - h) / h**2) * slope
    torch.testing.assert_close(moved + shifted.mu, published_second_order(shifted, form, 1, states), **CLOSE)


def test_the_published_sde_step_is_ddim_with_eta_one(shifted):
    z = noise_of(16).normal((2,), "z")
    states, mu = steps_of(shifted, {"name": "ddim", "eta": 1.0}, z), shifted.mu
    for i, t in enumerate(TIMES[:-1]):
        x, (alpha_t, sigma_t, alpha_s, sigma_s, h) = states[i], pieces(shifted, i)
        gain = -math.expm1(-2 * h)
        by_data = sigma_s / sigma_t * math.exp(-h) * x + alpha_s * gain * shifted.clean(x, t)
        by_data = by_data + sigma_s * math.sqrt(gain) * z
        by_data = by_data + mu * (1 - alpha_s / alpha_t * math.exp(-2 * h) - alpha_s * gain)
        torch.testing.assert_close(states[i + 1], by_data, **CLOSE)


def test_the_published_noise_form_of_the_sde_step_differs_from_the_data_form_at_second_order(shifted):
    # In the noise form the drift counts the prediction twice: x = a x - 2 sigma (e^h - 1) eps + sigma sqrt(e^2h - 1) z.
    # Both have the right law as h goes to 0 and are not equal at finite h: their means differ by O(h^2).
    p, t, x = shifted.process, 0.5, noise_of(16).normal((2,), "x") * 0.4
    gaps = []
    for h in (0.02, 0.01):
        s = p.time(p.lam(t) + h)
        eps, x0_hat = shifted.noise(x + shifted.mu, t), shifted.clean(x + shifted.mu, t) - shifted.mu
        noise_form = p.alpha(s) / p.alpha(t) * x - 2 * p.sigma(s) * math.expm1(h) * eps
        data_form = p.sigma(s) / p.sigma(t) * math.exp(-h) * x - p.alpha(s) * math.expm1(-2 * h) * x0_hat
        gaps.append((noise_form - data_form).abs().max().item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


def test_solvers_keep_their_order_on_this_schedule():
    model, counts = GMM(process="mr").load("cpu"), (40, 80, 160)

    def end(solver, steps):
        return run({"name": solver}, model, np.linspace(1.0, 0.1, steps + 1).tolist(), 16)

    exact = end("heun", 2560)
    for name, order in (("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)):
        errors = [float((end(name, n) - exact).square().mean().sqrt()) for n in counts]
        assert abs(-np.polyfit(np.log(counts), np.log(errors), 1)[0] - order) < 0.3, (name, errors)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_of_a_gaussian_have_its_moments(eta):
    mean, variance, rows = 0.6, 0.25, 20_000
    model = GMM(process="mr", means=((mean,),), covariances=((variance,),)).load("cpu")
    p, times = model.process, np.linspace(1.0, 0.0, 401).tolist()
    m, v = 0.0, p.prior_std() ** 2
    for t, s in zip(times, times[1:], strict=False):  # every step is linear: x_s = a x_t + b + nu z
        gain = p.alpha(t) * variance / (p.alpha(t) ** 2 * variance + p.sigma(t) ** 2)
        ratio = p.alpha(t) / p.alpha(s)
        nu2 = eta**2 * p.sigma(s) ** 2 / p.sigma(t) ** 2 * (p.sigma(t) ** 2 - ratio**2 * p.sigma(s) ** 2)
        carry = math.sqrt(max(p.sigma(s) ** 2 - nu2, 0.0))
        a = p.alpha(s) * gain + carry * (1 - p.alpha(t) * gain) / p.sigma(t)
        b = (p.alpha(s) - carry * p.alpha(t) / p.sigma(t)) * (mean - gain * p.alpha(t) * mean)
        m, v = a * m + b, a**2 * v + nu2
    x = run({"name": "ddim", "eta": eta}, model, times, rows).numpy()
    assert abs(x.mean() - m) < 5 * math.sqrt(v / rows)
    assert abs(x.var() / v - 1) < 5 * math.sqrt(2 / rows)
    assert m == pytest.approx(mean, abs=0.01)
    assert v == pytest.approx(variance, rel=0.02)


# --- the posterior of the restoration model --------------------------------------------------------------------------


def one_component(monkeypatch, spec):
    """The same measurements for data of a single Gaussian, which has a textbook posterior."""
    pixels = digits.images().reshape(-1, 64).astype(np.float64)
    mean, covariance = pixels.mean(0), np.cov(pixels.T, bias=True) + 0.01 * np.eye(64)
    monkeypatch.setattr("tasks.models.restore.fit_digits", lambda ridge: (np.ones(1), mean[None], covariance[None]))
    return mean, covariance, Restore(**{f: getattr(spec, f) for f in ("task", "block", "noise_std")}, num_images=5)


@EVERY_TASK
def test_the_posterior_mean_of_one_gaussian_is_linear_conditioning_by_brute_force(monkeypatch, spec):
    mean, covariance, spec = one_component(monkeypatch, spec)
    model, p = spec.load("cpu"), spec.noising
    x = noise_of(5).normal((1, 8, 8), "x")
    for t in (0.05, 0.5, 1.0):
        found = model.denoise(x, t, torch.arange(5)).view(5, 64).numpy()
        for i in range(5):
            # x_t - mu and y are jointly Gaussian with x0: two measurements, stacked and conditioned at once.
            a = np.concatenate([p.alpha(t) * np.eye(64), spec.operator])
            seen = np.concatenate([x[i].numpy().ravel() + p.alpha(t) * spec.degraded[i], spec.measurements[i]])
            noise = np.diag(np.concatenate([np.full(64, p.sigma(t) ** 2), np.full(len(spec.operator), spec.variance)]))
            gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + noise)
            expected = mean + gain @ (seen - a @ mean) - spec.degraded[i]
            np.testing.assert_allclose(found[i], expected, atol=2e-8)


@EVERY_TASK
def test_the_posterior_is_bayes_rule(spec):
    # log p(x0) + log p(y | x0) - log p(x0 | y) does not depend on x0.
    from scipy.stats import multivariate_normal as normal

    weights, means, covariances = fit_digits(spec.ridge)
    logits, posterior_means, variances, vectors = spec.posterior
    row, rng = 3, np.random.default_rng(0)
    picks = posterior_means[row, rng.choice(10, size=6, p=np.exp(logits[row]))]
    evidence = []
    for x0 in picks + rng.normal(size=picks.shape) * np.sqrt(variances.min()):
        prior = np.logaddexp.reduce(
            [np.log(w) + normal(m, c).logpdf(x0) for w, m, c in zip(weights, means, covariances, strict=True)]
        )
        seen = -0.5 * ((spec.measurements[row] - spec.operator @ x0) ** 2).sum() / spec.variance
        rotated = np.einsum("kij,ki->kj", vectors, x0 - posterior_means[row])
        parts = logits[row] - 0.5 * (rotated**2 / variances + np.log(2 * np.pi * variances)).sum(1)
        evidence.append(prior + seen - np.logaddexp.reduce(parts))
    np.testing.assert_allclose(evidence, evidence[0], rtol=0, atol=1e-5)


@EVERY_TASK
def test_drawing_digits_and_measuring_them_agrees_with_the_posterior_means(spec):
    # Tower property: over draws of (x0, y) of the model itself, x0 - E[x0 | y] has mean zero and is uncorrelated with
    # E[x0 | y]; and the spread of the errors is that of the posterior.
    rows, rng = 4000, np.random.default_rng(7)
    weights, means, covariances = fit_digits(spec.ridge)
    component = rng.choice(10, size=rows, p=weights)
    x0 = means[component] + np.einsum(
        "nij,nj->ni", np.linalg.cholesky(covariances)[component], rng.normal(size=(rows, 64))
    )
    fresh = Restore(**{f: getattr(spec, f) for f in ("task", "block", "noise_std")}, num_images=256)
    y = x0 @ spec.operator.T + math.sqrt(spec.variance) * rng.normal(size=(rows, len(spec.operator)))
    fresh.__dict__["measurements"] = y  # the cached value: the images of this model are these draws
    logits, posterior_means, variances, _ = fresh.posterior
    share = np.exp(logits)
    mean = np.einsum("nk,nkd->nd", share, posterior_means)
    error = x0 - mean
    deviation = error.std(0) / math.sqrt(rows)
    assert (np.abs(error.mean(0)) < 5 * deviation).all()
    inner = (error * mean).sum(1)
    assert abs(inner.mean()) < 5 * inner.std() / math.sqrt(rows)
    within = share @ variances.sum(1) + (share[..., None] * (posterior_means - mean[:, None]) ** 2).sum((1, 2))
    gap = (error**2).sum(1) - within
    assert abs(gap.mean()) < 5 * gap.std() / math.sqrt(rows)


@EVERY_TASK
def test_at_the_start_the_prediction_is_nearly_the_posterior_mean(spec):
    model, cond = spec.load("cpu"), torch.arange(64)
    logits, means, _, _ = spec.posterior
    expected = np.einsum("nk,nkd->nd", np.exp(logits), means)[:64] - spec.degraded[:64]
    x = model.process.prior((1, 8, 8), noise_of(64))
    found = model.denoise(x, 1.0, cond).view(64, 64).numpy()
    assert np.sqrt(((found - expected) ** 2).mean()) < 0.02  # the state still says delta / sigma_inf of x0


@EVERY_TASK
def test_the_posterior_mean_has_the_best_psnr_then_samples_then_the_degraded_image(spec):
    model, cond, psnr = spec.load("cpu"), torch.arange(1024) % 256, registry.rewards.build("psnr")
    mean = model.decode(run({"name": "euler"}, model, [1.0, 0.0], 1024, cond), cond)
    times = np.linspace(1, 0, 41).tolist()
    sample = model.decode(run({"name": "dpmpp_2m"}, model, times, 1024, cond), cond)
    score = {
        "mean": psnr(mean, cond)[:256].mean(),
        "sample": psnr(sample, cond).mean(),
        "degraded": psnr(torch.from_numpy(spec.degraded).clamp(-1, 1).view(-1, 1, 8, 8), cond[:256]).mean(),
    }
    assert score["mean"] > score["sample"] + 1
    assert score["mean"] > score["degraded"] + 2
    # Samples are as good as exact draws from the posterior.
    exact, label = (torch.from_numpy(a) for a in spec.reference(1024))
    values = psnr(exact, label)
    assert torch.equal(label, cond)
    assert abs(score["sample"] - values.mean()) < 0.5


def test_samples_have_the_law_of_the_posterior():
    spec, rows = TASKS["inpaint"], 2000
    cond = torch.full((rows,), 7)
    model = spec.load("cpu")
    x = run(
        {"name": "heun"}, model, registry.times.build({"name": "uniform", "num_steps": 25})(model.process), rows, cond
    )
    x0 = x.view(-1, 64).numpy() + spec.degraded[7]
    logits, means, variances, vectors = (a[7] if i < 2 else a for i, a in enumerate(spec.posterior))
    share = np.exp(logits)
    mean = share @ means
    spread = np.einsum("k,kij,kj,klj->il", share, vectors, variances, vectors)
    spread += np.einsum("k,ki,kj->ij", share, means - mean, means - mean)
    deviation = np.sqrt(np.diag(spread))
    assert (np.abs(x0.mean(0) - mean) < 5 * deviation / math.sqrt(rows) + 0.01 * deviation).all()
    np.testing.assert_allclose(x0.var(0), np.diag(spread), rtol=0.2)


def test_a_time_a_row_is_that_time():
    model, x, cond = TASKS["inpaint"].load("cpu"), noise_of(6).normal((1, 8, 8), "x"), torch.arange(6) * 40
    times = torch.tensor([1.0, 0.7, 0.5, 0.2, 0.05, 0.0], dtype=torch.float64)
    rows = model.denoise(x, times, cond)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(rows[i], model.denoise(x, t, cond)[i], rtol=1e-12, atol=1e-12)
    assert model.denoise(x.float(), 0.5, cond).dtype == torch.float32


def test_rows_without_a_label_are_refused():
    model, x = Restore(num_images=4).load("cpu"), torch.zeros(2, 1, 8, 8)
    for cond in (None, torch.tensor([0, 4])):
        for call in (lambda c: model.denoise(x, 0.5, c), lambda c: model.decode(x, c)):
            with pytest.raises(ValueError, match="needs a label in every row.*below 4"):
                call(cond)


def test_the_revision_names_the_measurements():
    revisions = {spec.revision for spec in TASKS.values()}
    assert len(revisions) == len(TASKS)
    assert Restore().revision == TASKS["inpaint"].revision
    assert Restore(num_images=255).revision != TASKS["inpaint"].revision
    np.testing.assert_array_equal(Restore(num_images=3).measurements, TASKS["inpaint"].measurements[:3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "inpant"}, "unknown task 'inpant', did you mean 'inpaint'"),
        ({"block": "upper"}, "unknown block 'upper'"),
        ({"schedule": "x"}, "unknown theta schedule 'x'"),
        ({"task": "denoise", "noise_std": 0.0}, "nothing to remove with model.noise_std=0"),
        ({"floor": 0.0}, "model.floor > 0, got 0.2 and 0.0"),
        ({"num_images": 0}, "num_images must be 1 to 1797, got 0"),
        ({"ridge": 0.0}, "ridge must be positive, got 0.0"),
        ({"sigma_inf": -1.0}, "sigma_inf must be positive, got -1.0"),
    ],
)
def test_the_model_refuses_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.models.build({"name": "restore"} | fields)


def test_a_recipe_makes_restored_images_in_range():
    recipe = Recipe(
        model={"name": "restore", "num_images": 8},
        solver={"name": "dpmpp_2m"},
        times={"name": "uniform", "num_steps": 4},
        guidance={"name": "none"},
        strategy={"name": "single"},
        batch_size=16,
    ).completed()
    recipe.check()
    rows = generate(recipe, 0, 24)
    assert rows["x0"].shape == (24, 1, 8, 8)
    assert np.abs(rows["x0"]).max() <= 1
    assert rows["label"].tolist() == [i % 8 for i in range(24)]
    assert json.loads(json.dumps(recipe.model)) == recipe.model
    # What is seen stays close to what was measured.
    spec = recipe.parts.model
    seen = spec.operator.any(0)
    gap = rows["x0"].reshape(24, 64)[:, seen] - np.clip(spec.degraded[rows["label"]][:, seen], -1, 1)
    assert np.sqrt((gap**2).mean()) < 2 * spec.noise_std


def test_best_of_n_judges_the_restored_image_and_not_its_distance_from_the_degraded_one():
    recipe = Recipe(
        model={"name": "restore", "num_images": 8},
        solver={"name": "ddim"},
        times={"name": "uniform", "num_steps": 3},
        guidance={"name": "none"},
        strategy={"name": "best_of_n", "n": 3},
        reward={"name": "psnr"},
        batch_size=24,
    ).completed()
    recipe.check()
    rows = generate(recipe, 0, 8)
    values = registry.rewards.build("psnr")(torch.from_numpy(rows["x0"]), torch.from_numpy(rows["label"]))
    np.testing.assert_allclose(rows["candidate_rewards"].max(1), values, rtol=1e-5)


# --- psnr ------------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_error():
    psnr, cond = registry.rewards.build("psnr"), torch.tensor([0, 5, 9])
    clean = torch.from_numpy(digits.images())[cond]
    assert psnr(clean + 0.02, cond).tolist() == pytest.approx([40.0] * 3, abs=1e-3)
    assert psnr(clean, cond).tolist() == [100.0] * 3
    assert psnr(clean + 2.0, cond).tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_psnr_refuses_what_it_cannot_compare():
    psnr = registry.rewards.build("psnr")
    psnr.check((1, 8, 8))
    with pytest.raises(ValueError, match=r"8x8 digits \(1, 8, 8\), but the model makes \(64,\)"):
        psnr.check((64,))
    with pytest.raises(ValueError, match="psnr needs labels"):
        psnr(torch.zeros(1, 1, 8, 8), None)
    with pytest.raises(ValueError, match="labels 0 to 1796, got 1797 to 1797"):
        psnr(torch.zeros(1, 1, 8, 8), torch.tensor([1797]))
