"""Linear measurements: adjoints, spectra, likelihoods, and problems that are functions of a row's index."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.data import digits
from tasks.measurements import KINDS, Measured, operator
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate, score
from tasks.sampler import CountedReward

SHAPES = [(1, 8, 8), (3, 8, 4), (6,)]


def made(kind, shape, **fields):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(5, math.prod(shape))).tolist()
    return operator(kind, shape, width=0.8, matrix=matrix, **fields)


def dense(found, shape):
    """A as a matrix (M, D), column by column."""
    return found(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).T


CASES = [(kind, shape, {}) for kind in KINDS for shape in SHAPES]
CASES += [("inpaint", shape, {"block": "centre"}) for shape in SHAPES]
EVERY = pytest.mark.parametrize(("kind", "shape", "fields"), CASES)


@EVERY
def test_the_adjoint_is_the_adjoint(kind, shape, fields):
    found = made(kind, shape, **fields)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(4, found.size, generator=generator, dtype=torch.float64)
    left, right = (found(x) * y).sum(1), (x * found.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@EVERY
def test_the_trace_is_that_of_the_matrix(kind, shape, fields):
    found = made(kind, shape, **fields)
    a = dense(found, shape)
    assert a.shape[0] == found.size
    assert found.trace == pytest.approx(float((a.T @ a).trace()), rel=1e-12)


@EVERY
def test_functions_of_the_spectrum_are_those_of_the_matrix(kind, shape, fields):
    found = made(kind, shape, **fields)
    a = dense(found, shape)
    values, vectors = torch.linalg.eigh(a.T @ a)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x.flatten(1) @ vectors @ torch.diag(torch.exp(-2 * values)) @ vectors.T
    actual = found.spectral(x, lambda v: torch.exp(-2 * v)).flatten(1)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_what_is_lost_is_what_was_asked_for():
    keep = operator("inpaint", (1, 8, 8)).adjoint(torch.ones(1, 32)).view(8, 8)
    assert keep[:4].all() and not keep[4:].any()
    keep = operator("inpaint", (1, 8, 8), block="centre").adjoint(torch.ones(1, 48)).view(8, 8)
    assert not keep[2:6, 2:6].any() and keep.sum() == 48
    image = torch.arange(64.0).view(1, 1, 8, 8)
    torch.testing.assert_close(operator("pool", (1, 8, 8))(image)[0, 0], torch.tensor(4.5, dtype=torch.float64))
    assert operator("subsample", (1, 8, 8))(image)[0].tolist() == image[0, 0, ::2, ::2].flatten().tolist()
    assert operator("blur", (1, 8, 8))(torch.ones(1, 1, 8, 8)).numpy() == pytest.approx(1.0)


def test_the_likelihood_is_that_of_a_normal_with_its_gradient_and_laplacian():
    a = operator("matrix", (3,), matrix=[[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    y = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    measured = Measured(a, y, 0.7)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    value = measured(x)
    torch.testing.assert_close(value, torch.distributions.Normal(a(x), 0.7).log_prob(y).sum(1))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, a.adjoint(measured.residual(x)) / 0.49)
    hessian = torch.autograd.functional.hessian(lambda v: measured(v[None].expand(2, -1))[0], x[0].detach())
    assert measured.laplacian == pytest.approx(float(hessian.trace()))


@pytest.mark.parametrize("kind", ["inpaint", "blur", "matrix"])
def test_relaxing_twice_for_half_the_time_is_relaxing_once(kind):
    shape = (1, 8, 8)
    found = made(kind, shape)
    generator = torch.Generator().manual_seed(3)
    measured = Measured(found, torch.randn(2, found.size, generator=generator, dtype=torch.float64), 0.5)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(x)
    once, half = measured.relax(x, zero, 0.3), measured.relax(x, zero, 0.15)
    torch.testing.assert_close(measured.relax(half, zero, 0.15), once, rtol=1e-10, atol=1e-10)
    # Noise that enters in two independent halves has the variance of noise that enters at once: look at the matrices.
    basis = torch.eye(64, dtype=torch.float64).view(-1, *shape)
    nothing = Measured(found, torch.zeros(64, found.size, dtype=torch.float64), 0.5)
    whole = nothing.relax(torch.zeros_like(basis), basis, 0.3).flatten(1)
    late = nothing.relax(torch.zeros_like(basis), basis, 0.15).flatten(1)
    early = nothing.relax(late.view(-1, *shape), torch.zeros_like(basis), 0.15).flatten(1)
    torch.testing.assert_close((late.T @ late + early.T @ early) / 2, whole.T @ whole, rtol=1e-9, atol=1e-9)


def test_relaxing_follows_the_gradient_and_ends_at_the_measurement():
    measured = Measured(operator("all", (2,)), torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.1)
    x, zero = torch.tensor([[0.0, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    small = measured.relax(x, zero, 1e-7)
    torch.testing.assert_close((small - x) / 1e-7, measured.residual(x) / 0.01, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured.relax(x, zero, 10.0), measured.y)
    # With noise of variance v over a long time the law is N(y, sigma_y^2 v / 2 time): its standard deviation.
    kick = torch.ones_like(x)
    torch.testing.assert_close(measured.relax(measured.y, kick, 10.0) - measured.y, kick * math.sqrt(0.01 / 20))


# --- a row's own measurement -----------------------------------------------------------------------------------------


def test_the_measurement_of_a_row_is_a_function_of_its_index():
    reward = registry.rewards.build({"name": "measurement", "operator": "blur", "sigma_y": 0.2})
    many = reward.at(torch.arange(3000, 3012))
    for i in (0, 7):
        torch.testing.assert_close(reward.at(torch.tensor([3000 + i])).y[0], many.y[i], rtol=0, atol=0)
    other = registry.rewards.build({"name": "measurement", "operator": "blur", "sigma_y": 0.2, "seed": 1})
    assert not torch.isclose(other.at(torch.arange(3000, 3012)).y, many.y).any()


def test_a_row_measures_the_reference_item_of_its_index():
    reward = registry.rewards.build({"name": "measurement", "operator": "pool", "sigma_y": 0.5})
    indices = torch.cat([torch.arange(1797), torch.arange(1797) + 1797])  # the second time round with other noise
    measured = reward.at(indices)
    clean = torch.from_numpy(digits.images()).double().view(-1, 4, 2, 4, 2).mean(dim=(2, 4)).flatten(1).repeat(2, 1)
    noise = (measured.y - clean) / 0.5
    assert noise.std() == pytest.approx(1.0, abs=5 / math.sqrt(2 * noise.numel()))
    assert noise.mean() == pytest.approx(0.0, abs=5 / math.sqrt(noise.numel()))
    assert not torch.isclose(noise[:1797], noise[1797:]).all(dim=1).any()


def test_one_item_or_one_measurement_can_be_given_to_all_rows():
    one = registry.rewards.build({"name": "measurement", "item": 3}).at(torch.arange(4))
    assert (one.y == one.y[0]).all()
    torch.testing.assert_close(one.y[0], registry.rewards.build("measurement").at(torch.tensor([3])).y[0])
    given = {"name": "measurement", "model": {"name": "gmm"}, "operator": "all", "y": [0.5, -1.0]}
    assert registry.rewards.build(given).at(torch.arange(3)).y.tolist() == [[0.5, -1.0]] * 3


def test_strategies_and_columns_score_a_row_against_the_same_measurement():
    spec = {"name": "measurement", "operator": "inpaint", "sigma_y": 0.5}
    recipe = Recipe(
        model="digits", solver="ddim", times={"name": "uniform", "num_steps": 2}, guidance="none", labels=None,
        strategy={"name": "best_of_n", "n": 3}, reward=spec, batch_size=16,
    ).completed()  # fmt: skip
    recipe.check()
    rows = generate(recipe, 7, 18)
    chosen = np.take_along_axis(rows["candidate_rewards"], rows["slot"][:, None], axis=1)[:, 0]
    column = score(recipe.reward, rows["x0"], rows["label"], 7, 16, "cpu")
    np.testing.assert_allclose(column, chosen, rtol=1e-5)
    shifted = score(recipe.reward, rows["x0"], rows["label"], 8, 16, "cpu")
    assert not np.isclose(shifted, chosen).any()


def test_recovery_is_perfect_for_the_item_itself_and_known_for_a_shift():
    psnr = registry.rewards.build("recovery_psnr").at(torch.tensor([5, 1796, 1797]))
    clean = torch.from_numpy(digits.images()[[5, 1796, 0]])
    assert psnr(clean, None).tolist() == [100.0] * 3
    np.testing.assert_allclose(psnr(clean + 0.2, None), 20 * math.log10(2 / 0.2), rtol=1e-5)


def test_samples_are_compared_with_items_of_their_own_shape_whatever_states_are():
    shape = (1, 8, 8)  # of samples; states are 64 tokens
    for name in ("measurement", "neighbour_products", "recovery_psnr"):
        reward = registry.rewards.build({"name": name, "model": {"name": "digits_tokens"}})
        reward.check(shape)
        with pytest.raises(ValueError, match=r"of shape \(1, 8, 8\), but the samples have shape \(64,\)"):
            reward.check((64,))
        assert reward.at(torch.arange(3))(torch.zeros(3, *shape), None).shape == (3,)


@pytest.mark.parametrize("name", ["measurement", "neighbour_products"])
def test_the_noise_of_a_measurement_is_keyed_by_the_seed_and_the_item(name):
    spec = {"name": name, "sigma_y": 0.3, "seed": 5}
    fine = registry.rewards.build(spec | {"sigma_y": 1e-12}).at(torch.tensor([3])).y
    expected = 0.3 * RowNoise(5, torch.tensor([3]), dtype=torch.float64).normal((fine.shape[1],), "measurement")
    for reward, index in ((spec, 3), (spec | {"item": 3}, 40)):
        found = registry.rewards.build(reward).at(torch.tensor([index])).y
        torch.testing.assert_close(found - fine, expected, rtol=0, atol=1e-10)


def test_a_mean_reward_can_be_that_of_a_whole_spec():
    spec = {"name": "measurement", "operator": "blur", "sigma_y": 0.3}
    metric = registry.metrics.build({"name": "mean_reward", "reward": spec})
    assert metric.needs() == (registry.rewards.complete(spec),)
    assert metric.better == {"reward/measurement": "higher"}
    found = metric.compute(metric.summarize({"measurement": np.array([1.0, 4.0])}), None)
    assert found == {"reward/measurement": 2.5}


def test_a_counted_reward_asks_about_its_rows_and_keeps_one_account():
    scorer = registry.rewards.build("measurement")
    reward = CountedReward(scorer, "measurement", torch.arange(4, 6))
    x = torch.zeros(4, 1, 8, 8)
    expected = scorer.at(torch.tensor([4, 4, 5, 5]))(x)
    torch.testing.assert_close(reward(x, None), expected)
    torch.testing.assert_close(reward.at(torch.tensor([5]))(x[:1], None), expected[2:3])
    assert reward.rows == 5
    with pytest.raises(ValueError, match="depends on the row, but was asked about 3 samples of 2 rows"):
        reward(x[:3], None)
    with pytest.raises(ValueError, match="samples of no rows"):
        CountedReward(scorer, "measurement")(x, None)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operator": "inpant"}, "unknown operator 'inpant', did you mean 'inpaint'"),
        ({"block": "upper"}, "unknown block 'upper'"),
        ({"operator": "blur", "width": 0.0}, "reward.width must be positive, got 0.0"),
        ({"operator": "pool", "factor": 3}, r"divide the sides \(8, 8\); got 3"),
        ({"operator": "matrix"}, "reward.matrix must be rows of 64 numbers each"),
        ({"operator": "matrix", "matrix": [[1.0, 2.0]]}, "reward.matrix must be rows of 64 numbers each"),
        ({"sigma_y": 0.0}, "reward.sigma_y must be positive, got 0.0"),
        ({"item": -1}, "reward.item must be at least 0, got -1"),
        ({"y": [1.0]}, "reward.y must be the 32 numbers that inpaint measures, got 1"),
    ],
)
def test_impossible_measurements_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.rewards.build({"name": "measurement"} | fields)


@pytest.mark.parametrize("name", ["measurement", "recovery_psnr"])
def test_a_reward_of_the_row_is_refused_without_rows_and_for_other_shapes(name):
    reward = registry.rewards.build(name)
    with pytest.raises(ValueError, match=r"without their rows. Call .at\(indices\) first"):
        reward(torch.zeros(2, 1, 8, 8), None)
    with pytest.raises(ValueError, match=r"of shape \(1, 8, 8\), but the samples have shape \(2,\)"):
        reward.check((2,))


def test_labels_that_ask_for_another_class_than_the_measurement_are_refused():
    recipe = Recipe(
        model="digits",
        solver="ddim",
        times="uniform",
        guidance="none",
        strategy={"name": "best_of_n"},
        reward="measurement",
    ).completed()
    with pytest.raises(ValueError, match="whose label asks for another class. Set labels=null"):
        recipe.check()
    recipe.override({"labels": None}).check()
