"""PFGM++: the prior and its limits, the exact posterior of a point set, and what its ODE does."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tasks import registry
from tasks.data import digits
from tasks.models.empirical import Empirical
from tasks.noise import RowNoise
from tasks.pfgm import PFGMpp
from tasks.processes import EDM
from tasks.sampler import CountedModel, Sampler

TWO = ((-1.0, 0.5, 0.0), (1.0, 0.0, -0.5))


def noise_of(rows, seed=0, dtype=torch.float64):
    return RowNoise(seed, torch.arange(rows), dtype=dtype)


def run(spec, model, times, rows, cond=None):
    sampler = Sampler(CountedModel(model, 10**6), registry.solvers.build(spec), tuple(times), cond)
    return sampler.run(noise_of(rows)).x


def karras(process, steps):
    return registry.times.build({"name": "karras", "num_steps": steps})(process)


# --- the process -----------------------------------------------------------------------------------------------------


def test_levels_are_those_of_edm():
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    for name in ("alpha", "sigma", "lam", "model_time"):
        assert torch.equal(getattr(PFGMpp(), name)(t), getattr(EDM(), name)(t))
    assert PFGMpp().time(0.3) == EDM().time(0.3)
    assert (PFGMpp().t_min, PFGMpp().kind, PFGMpp().stochastic_ok) == (EDM().t_min, "gaussian", False)


@pytest.mark.parametrize(("dim", "ratio"), [(128, 1.0056), (2048, 1.0004), (1e6, 0.9998)])
def test_the_prior_has_the_published_norms(dim, ratio):
    rows, width = 6000, 3072
    norms = PFGMpp(aug_dim=dim).prior((width,), noise_of(rows)).norm(dim=1).numpy() / (80 * math.sqrt(width))
    # E|x| in closed form: a chi with N degrees, divided by the root of a chi-square with D over D.
    from scipy.special import gammaln

    log_mean = gammaln((width + 1) / 2) - gammaln(width / 2) + gammaln((dim - 1) / 2) - gammaln(dim / 2)
    exact = math.exp(log_mean) * math.sqrt(dim / width)
    error = norms.std() / math.sqrt(rows)
    assert abs(norms.mean() - exact) < 5 * error
    assert abs(norms.mean() - ratio) < 5 * error + 1e-4  # they print four digits
    assert norms.std() == pytest.approx({128: 0.064, 2048: 0.020, 1e6: 0.013}[dim], abs=1.5e-3)


@pytest.mark.parametrize("dim", [1.0, 3.0, 7.5, 128.0])
@pytest.mark.parametrize("width", [1, 4])
def test_the_prior_is_the_published_beta_law(dim, width):
    rows, t = 20_000, 0.25
    process = PFGMpp(aug_dim=dim)
    x = process.prior((width,), noise_of(rows), t)
    squares = x.square().sum(1).numpy()
    share = squares / (squares + (20.0 * math.sqrt(dim)) ** 2)  # r = sigma sqrt(D), sigma = 20
    assert stats.kstest(share, stats.beta(width / 2, dim / 2).cdf).pvalue > 1e-3
    # The direction is uniform, and independent of the length.
    direction = (x / x.norm(dim=1, keepdim=True)).numpy()
    assert (np.abs(direction.mean(0)) < 5 / math.sqrt(rows * width)).all()
    assert abs(np.corrcoef(share, direction[:, 0])[0, 1]) < 5 / math.sqrt(rows)


def test_one_augmented_dimension_is_the_cauchy_law():
    x = PFGMpp(aug_dim=1.0).prior((1,), noise_of(20_000)).numpy().ravel()
    assert stats.kstest(x, stats.cauchy(scale=80).cdf).pvalue > 1e-3


def test_the_density_is_the_kernel():
    # Student's t with D degrees and scale sigma, against (|x|^2 + r^2)^-((N + D)/2): their ratio is constant.
    dim, width, sigma = 5.0, 3, 0.7
    x = noise_of(50).normal((width,), "x").numpy() * 2
    kernel = -(width + dim) / 2 * np.log((x**2).sum(1) + sigma**2 * dim)
    gap = stats.multivariate_t(np.zeros(width), sigma**2 * np.eye(width), df=dim).logpdf(x) - kernel
    np.testing.assert_allclose(gap, gap[0], rtol=1e-12)


def test_a_row_draws_its_own_numbers():
    process, whole = PFGMpp(aug_dim=16), noise_of(8, dtype=torch.float32)
    x = process.prior((3,), whole)
    assert x.dtype == torch.float32
    some = RowNoise(0, torch.tensor([5, 2]))
    assert torch.equal(process.prior((3,), some), x[[5, 2]])
    assert not torch.equal(process.prior((3,), whole.slot(1)), x)


def test_draws_tend_to_those_of_edm():
    width = (12,)
    gaps = []
    for dim in (1e4, 1e6, 1e8):
        x, limit = PFGMpp(aug_dim=dim).prior(width, noise_of(500)), EDM().prior(width, noise_of(500))
        gaps.append(((x - limit).abs().max() / 80).item())
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 2e-3


def test_renoise_of_clean_data_is_the_kernel_and_of_anything_else_is_refused():
    process, rows = PFGMpp(aug_dim=6.0), 20_000
    clean = torch.full((rows, 1), 0.3, dtype=torch.float64)
    x = process.renoise(clean, 0.0, 0.01, noise_of(rows)).numpy().ravel()
    assert stats.kstest(x, stats.t(df=6, loc=0.3, scale=0.8).cdf).pvalue > 1e-3
    assert process.renoise(clean, 0.5, 0.5, noise_of(rows)) is clean
    with pytest.raises(ValueError, match=r"at t=0.2 cannot be noised to t=0.5: only clean data"):
        process.renoise(clean, 0.2, 0.5, noise_of(rows))


@pytest.mark.parametrize("dim", [0.0, -1.0, math.inf])
def test_impossible_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match="aug_dim must be positive and finite"):
        PFGMpp(aug_dim=dim)


# --- the exact posterior ---------------------------------------------------------------------------------------------


def test_two_points_have_the_posterior_in_closed_form():
    for dim in (1.0, 4.0, 128.0, 2048.0):
        model = Empirical(process="pfgmpp", aug_dim=dim, points=TWO).load("cpu")
        y = torch.tensor(TWO, dtype=torch.float64)
        x = noise_of(20).normal((3,), "x")
        for t in (1e-4, 0.01, 0.5):
            r2 = (80 * t) ** 2 * dim
            a, b = ((x - y[i]).square().sum(1) + r2 for i in range(2))
            second = torch.sigmoid(-0.5 * (3 + dim) * (torch.log(b) - torch.log(a)))[:, None]
            torch.testing.assert_close(model.denoise(x, t), y[0] + second * (y[1] - y[0]), rtol=1e-9, atol=1e-9)


def test_the_posterior_is_the_one_of_draws_from_the_kernel():
    # Points drawn, noised by the kernel, and kept where they fell near x: their shares are the posterior.
    rows, dim, t = 400_000, 3.0, 0.01
    process = PFGMpp(aug_dim=dim)
    points = torch.tensor([[-1.0], [0.2], [1.0]], dtype=torch.float64)
    which = torch.arange(rows) % 3
    x = process.renoise(points[which], 0.0, t, noise_of(rows)).ravel()
    model = Empirical(process="pfgmpp", aug_dim=dim, points=((-1.0,), (0.2,), (1.0,))).load("cpu")
    for at in (-1.5, 0.1, 4.0):
        near = (x - at).abs() < 0.05
        share = torch.bincount(which[near], minlength=3).numpy() / int(near.sum())
        expected = model.weights(torch.tensor([[at]], dtype=torch.float64), t)[0].numpy()
        assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / int(near.sum())) + 2e-3).all()


@pytest.mark.parametrize("process", ["vp", "edm", "flow", "mr"])
def test_gaussian_posteriors_are_the_softmax_over_all_pairs(process):
    spec = Empirical(process=process, num_points=40)
    model, y = spec.load("cpu"), torch.from_numpy(spec.data[0])
    times = torch.tensor([0.01, 0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    alpha, sigma = model.process.alpha(times)[:, None], model.process.sigma(times)[:, None]
    x = alpha * y[:6] + sigma * noise_of(6).normal((64,), "x")
    distance = (x[:, None] - alpha[:, None] * y).square().sum(-1)
    expected = torch.softmax(-distance / (2 * sigma**2), dim=-1) @ y
    torch.testing.assert_close(model.denoise(x, times), expected, rtol=1e-9, atol=1e-9)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(model.denoise(x[i : i + 1], t), expected[i : i + 1], rtol=1e-9, atol=1e-9)
    assert model.denoise(x.float(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("process", ["vp", "edm", "flow", "mr", "pfgmpp"])
def test_without_noise_the_nearest_point_is_the_answer(process):
    spec = Empirical(process=process, num_points=50)
    model, y = spec.load("cpu"), torch.from_numpy(spec.data[0])
    torch.testing.assert_close(model.denoise(y, 0.0), y, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(model.denoise(y + 0.3, 0.0)).all()


def test_a_huge_dimension_is_edm():
    heavy, limit = (Empirical(process=name, aug_dim=1e8).load("cpu") for name in ("pfgmpp", "edm"))
    y = torch.from_numpy(digits.images()[:64]).double().flatten(1)
    for t in (0.002 / 80, 0.01 / 80, 0.1 / 80, 1 / 80, 10 / 80, 1.0):
        x = y + 80 * t * noise_of(64).normal((64,), "x")
        torch.testing.assert_close(heavy.denoise(x, t), limit.denoise(x, t), rtol=0, atol=1e-4)
    near = Empirical(process="pfgmpp", aug_dim=16.0).load("cpu")
    x = y + noise_of(64).normal((64,), "x")
    assert (near.denoise(x, 1 / 80) - limit.denoise(x, 1 / 80)).abs().max() > 0.01  # a small one is not


def test_samples_of_a_huge_dimension_are_those_of_edm():
    ends = []
    for name in ("pfgmpp", "edm"):
        model = Empirical(process=name, aug_dim=1e8, points=TWO).load("cpu")
        ends.append(run({"name": "heun"}, model, karras(model.process, 18), 400))
    gap = (ends[0] - ends[1]).abs().amax(1)
    # A row that starts within 1e-3 of the watershed may go to the other point; all others end at the same one.
    assert (gap > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize("dim", [2.0, 64.0])
def test_the_ode_carries_the_prior_onto_the_points_in_the_right_proportions(dim):
    rows, points = 4000, ((-1.0, 0.0), (1.0, 0.5), (0.0, -1.0), (0.0, -1.0))  # the last one counts twice
    model = Empirical(process="pfgmpp", aug_dim=dim, points=points).load("cpu")
    x = run({"name": "heun"}, model, karras(model.process, 60), rows)
    places = torch.tensor(points[:3], dtype=torch.float64)
    distance, which = torch.cdist(x, places).min(1)
    assert (distance < 0.02).double().mean() > 0.99
    share, expected = torch.bincount(which, minlength=3).numpy() / rows, np.array([0.25, 0.25, 0.5])
    # The prior at sigma = 80 ignores that the points are not at the origin: O(1 / 80) of the mass.
    assert (np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / rows) + 0.01).all()


def test_the_ode_keeps_the_law_of_the_kernel():
    # One point: dx / dsigma = (x - y) / sigma has straight lines, which keep x's quantile in the kernel at every sigma.
    model = Empirical(process="pfgmpp", aug_dim=3.0, points=((0.4,),)).load("cpu")
    sampler = Sampler(CountedModel(model, 10**6), registry.solvers.build("euler"), (1.0, 0.3, 0.01))
    state = sampler.start(noise_of(2000))
    start = state.x
    for t in (0.3, 0.01):
        state = sampler.step(state, noise_of(2000))
        torch.testing.assert_close(state.x, 0.4 + t * (start - 0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_few_steps_return_digits(name):
    spec = Empirical(process="pfgmpp", aug_dim=128.0)
    model = spec.load("cpu")
    x = run({"name": name}, model, karras(model.process, 18), 200)
    distance = torch.cdist(x, torch.from_numpy(spec.data[0])).min(1).values
    assert (distance < 0.1).double().mean() > 0.95


# --- the model's fields ----------------------------------------------------------------------------------------------


def test_a_label_picks_the_points_of_its_class():
    spec = Empirical(process="pfgmpp", num_points=300, labels=True)
    model, classes = spec.load("cpu"), spec.data[1]
    assert spec.num_classes == 10
    x = noise_of(11).normal((64,), "x")
    weights = model.weights(x, 0.02, torch.arange(11)).numpy()
    for k in range(10):
        assert (weights[k][classes != k] == 0).all()
        assert weights[k].sum() == pytest.approx(1)
    free = Empirical(process="pfgmpp", num_points=300).load("cpu")
    np.testing.assert_allclose(weights[10], free.weights(x, 0.02)[10].numpy(), rtol=1e-12)


def test_reference_and_moments_are_those_of_the_points():
    spec = Empirical(points=((0.0, 1.0), (2.0, 1.0), (4.0, 4.0)), classes=(0, 0, 1), labels=True)
    points, classes = spec.reference()
    np.testing.assert_array_equal(points, [[0, 1], [2, 1], [4, 4]])
    assert classes.tolist() == [0, 0, 1]
    assert spec.num_classes == 2
    mean, covariance = spec.moments()
    np.testing.assert_allclose(mean, [2, 2])
    np.testing.assert_allclose(covariance, [[8 / 3, 2], [2, 2]])
    assert Empirical(points=((1.0,), (3.0,))).moments()[1].shape == (1, 1)
    assert spec.revision != Empirical(points=((0.0, 1.0), (2.0, 1.0), (4.0, 4.0)), classes=(0, 1, 1)).revision


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process": "pfgm"}, "unknown process 'pfgm', did you mean 'pfgmpp'"),
        ({"process": "pfgmpp", "aug_dim": 0.0}, "aug_dim must be positive and finite, got 0.0"),
        ({"num_points": 0}, "num_points must be 1 to 1797, got 0"),
        ({"points": [[1.0], [2.0, 3.0]]}, "rows of equal length"),
        ({"points": []}, "rows of equal length"),
        ({"classes": [0]}, "model.classes goes with model.points"),
        ({"points": [[1.0], [2.0]], "classes": [0]}, "a class for each of the 2 points, got 1"),
        ({"points": [[1.0], [2.0]], "classes": [0, 2], "labels": True}, r"from 0 to 2 needs a point.*\[0, 2\]"),
        ({"num_points": 5, "labels": True}, "every class from 0 to 9 needs a point"),
    ],
)
def test_the_model_refuses_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.models.build({"name": "empirical"} | fields)
