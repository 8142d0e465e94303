"""Posterior sampling: afdps against exact posteriors and tilts, dps as the biased baseline that it is."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.noise import RowNoise
from tasks.recipe import Recipe, grid_of
from tasks.run import generate, score
from tasks.sampler import CountedModel, CountedReward, Sampler

torch.set_num_threads(1)

WEIGHTS, MEANS, STDS = [0.4, 0.35, 0.25], [[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]], [0.5, 0.7, 0.4]
MIXTURE = {"name": "gmm", "means": MEANS, "covariances": STDS, "weights": WEIGHTS}
GAUSSIAN = {"name": "gmm", "means": [[0.5, -1.0]], "covariances": [[[1.0, 0.4], [0.4, 0.5]]]}
A, Y, SIGMA_Y = [[1.0, 0.5]], [1.0], 0.5


def measurement(model, **fields):
    matrix = {"operator": "matrix", "matrix": A, "sigma_y": SIGMA_Y, "model": model}
    return {"name": "measurement"} | matrix | fields


def recipe(strategy, model=MIXTURE, num_steps=100, **changes):
    fields = {"model": model, "solver": {"name": "ddim", "eta": 1.0}, "guidance": "none", "strategy": strategy}
    fields |= {"times": {"name": "uniform", "num_steps": num_steps}, "batch_size": 4096, "labels": None}
    fields |= {"reward": measurement(model, y=Y), "dtype": "float64"}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def posterior(model):
    """Mean, covariance and log evidence of the exact posterior of a mixture given Y: component by component."""
    weights, means, covariances = registry.models.build(model).parameters
    a, y = np.array(A), np.array(Y)
    logs, centres, spreads = [], [], []
    for weight, mean, covariance in zip(weights, means, covariances, strict=True):
        marginal = a @ covariance @ a.T + SIGMA_Y**2 * np.eye(1)
        gain = covariance @ a.T @ np.linalg.inv(marginal)
        miss = y - a @ mean
        scale = np.linalg.slogdet(2 * np.pi * marginal)[1]
        logs.append(math.log(weight) - 0.5 * miss @ np.linalg.solve(marginal, miss) - 0.5 * scale)
        centres.append(mean + gain @ miss)
        spreads.append(covariance - gain @ a @ covariance)
    evidence = np.logaddexp.reduce(logs)
    w = np.exp(logs - evidence)
    mean = w @ np.array(centres)
    offsets = np.array(centres) - mean
    return mean, np.einsum("k,kij->ij", w, spreads) + np.einsum("k,ki,kj->ij", w, offsets, offsets), evidence


def weighted(made, particles, row=0):
    """All particles of one row, without resampling: states, log weights."""
    model = made.parts.model.load("cpu")
    indices = torch.tensor([row])
    sampler = Sampler(CountedModel(model, 10**6), made.parts.solver, grid_of(made.parts)[0]).repeat(particles)
    streams = RowNoise(0, indices, dtype=torch.float64).repeat(particles)
    asked = CountedReward(made.parts.reward, "reward", indices).at(streams.indices)
    strategy, state = made.parts.strategy, sampler.start(streams)
    log_w = asked(state.x, None) * strategy._beta(1.0)
    for _ in range(sampler.num_steps):
        state, gain = strategy._step(sampler, asked, state, streams)
        log_w = log_w + gain
    return state.x.numpy(), log_w.numpy()


def summary(x, log_w):
    w = np.exp(log_w - np.logaddexp.reduce(log_w))
    mean = w @ x
    return mean, w @ ((x - mean) ** 2).sum(1), np.logaddexp.reduce(log_w) - math.log(len(w)), 1 / (w**2).sum()


# --- afdps -----------------------------------------------------------------------------------------------------------


def test_weighted_particles_have_the_exact_posterior_of_a_mixture():
    mean, covariance, evidence = posterior(MIXTURE)
    x, log_w = weighted(recipe({"name": "afdps", "n": 8192}, num_steps=400), 8192)
    found, trace, log_z, size = summary(x, log_w)
    assert size > 4000  # measured 4,600 to 4,800: the weights stay even
    error = math.sqrt(np.trace(covariance) / size)
    np.testing.assert_allclose(found, mean, atol=5 * error)
    # Fourth moments of a mixture are no larger than a Gaussian's here: sd of a trace is below tr * sqrt(2 / size).
    assert trace == pytest.approx(np.trace(covariance), abs=5 * np.trace(covariance) * math.sqrt(1 / size))
    assert log_z == pytest.approx(evidence, abs=5 / math.sqrt(size))


def test_draws_of_a_row_follow_the_posterior_and_its_evidence_is_unbiased():
    made = recipe({"name": "afdps", "n": 32}, GAUSSIAN)
    mean, covariance, evidence = posterior(GAUSSIAN)
    rows = generate(made, 0, 1024)
    error = np.sqrt(np.diag(covariance) / 1024)
    assert (np.abs(rows["x0"].mean(0) - mean) < 5 * error).all()
    np.testing.assert_allclose(np.cov(rows["x0"].T), covariance, atol=5 * np.trace(covariance) * math.sqrt(2 / 1024))
    z = np.exp(rows["log_z"])
    # Ẑ is unbiased for any number of particles, up to the steps' error (+0.008 here at 100 steps).
    assert math.log(z.mean()) == pytest.approx(evidence, abs=5 * z.std() / z.mean() / math.sqrt(len(z)) + 0.01)
    assert rows["ess"].shape == (1024, 100) and (rows["ess"] >= 1).all() and (rows["ess"] <= 32 + 1e-9).all()


def test_every_row_samples_the_posterior_of_its_own_measurement():
    made = recipe({"name": "afdps", "n": 32}, GAUSSIAN, reward=measurement(GAUSSIAN))
    rows = generate(made, 0, 1024)
    y = made.parts.reward.at(torch.arange(1024)).y.numpy()
    mean, covariance = (values[0] for values in registry.models.build(GAUSSIAN).parameters[1:])
    a = np.array(A)
    gain = covariance @ a.T / (a @ covariance @ a.T + SIGMA_Y**2)
    exact = mean + (y - a @ mean) @ gain.T
    left = covariance - gain @ a @ covariance
    off = rows["x0"] - exact
    assert (np.abs(off.mean(0)) < 5 * np.sqrt(np.diag(left) / 1024)).all()
    np.testing.assert_allclose(np.cov(off.T), left, atol=5 * np.trace(left) * math.sqrt(2 / 1024))


def test_constant_beta_with_the_whole_gradient_degenerates():
    _, _, evidence = posterior(MIXTURE)
    x, log_w = weighted(recipe({"name": "afdps", "n": 4096, "kappa": 1.0, "power": 0.0}, num_steps=400), 4096)
    _, _, log_z, size = summary(x, log_w)
    assert size < 200 and abs(log_z - evidence) > 1


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_other_kappas_agree_through_the_laplacian(kappa):
    # On one Gaussian, where all weights are tame: the Laplacian term is in, with its sign.
    mean, covariance, evidence = posterior(GAUSSIAN)
    x, log_w = weighted(recipe({"name": "afdps", "n": 4096, "kappa": kappa}, GAUSSIAN, num_steps=400), 4096)
    found, trace, log_z, size = summary(x, log_w)
    assert size > 100
    np.testing.assert_allclose(found, mean, atol=5 * math.sqrt(np.trace(covariance) / size))
    assert log_z == pytest.approx(evidence, abs=5 / math.sqrt(size) + 0.02)


def test_the_tilt_of_a_mixture_by_a_parabola_has_its_closed_form():
    # GM-1D, r = -(x - 1.5)^2 / 2, strength 2: mean 1.2497, variance 0.6311, log Z -1.5910.
    components = {"weights": [0.5, 0.3, 0.2], "means": [[-2.0], [0.5], [2.5]], "covariances": [[0.25], [0.09], [0.36]]}
    strategy = {"name": "afdps", "n": 4096, "strength": 2.0}
    made = recipe(strategy, {"name": "gmm"} | components, num_steps=400, reward="quadratic")
    found = [summary(*weighted(made, 4096, row)) for row in range(3)]
    assert np.mean([f[0][0] for f in found]) == pytest.approx(1.2497, abs=0.03)
    assert np.mean([f[1] for f in found]) == pytest.approx(0.6311, abs=0.03)
    assert np.mean([f[2] for f in found]) == pytest.approx(-1.5910, abs=0.03)


def test_one_particle_without_a_pull_is_single_draw_for_draw():
    one = generate(recipe({"name": "afdps", "n": 1, "kappa": 0.0}, num_steps=8), 0, 16)
    np.testing.assert_array_equal(one["x0"], generate(recipe("single", num_steps=8), 0, 16)["x0"])


def test_flow_models_begin_without_a_signal_and_stay_finite():
    model = GAUSSIAN | {"process": "flow"}
    mean, covariance, _ = posterior(model)
    x = generate(recipe({"name": "afdps", "n": 32}, model), 0, 512)["x0"]
    assert (np.abs(x.mean(0) - mean) < 5 * np.sqrt(np.diag(covariance) / 512) + 0.02).all()


# --- dps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeta", [0.1, 0.3])
def test_dps_is_too_narrow(zeta):
    mean, covariance, _ = posterior(MIXTURE)  # tr cov 2.577
    x = generate(recipe({"name": "dps", "zeta": zeta}), 0, 2048)["x0"]
    a, y = np.array(A)[0], Y[0]
    assert np.abs(x @ a - y).mean() < np.abs(generate(recipe("single"), 0, 2048)["x0"] @ a - y).mean() / 2
    assert np.trace(np.cov(x.T)) < 1.9  # measured 1.79 and 1.61
    assert abs(x.mean(0)[1] - mean[1]) > 8 * math.sqrt(covariance[1, 1] / 2048)


def test_dps_without_a_step_is_single_draw_for_draw():
    still = generate(recipe({"name": "dps", "zeta": 0.0}, num_steps=8), 0, 16)
    np.testing.assert_array_equal(still["x0"], generate(recipe("single", num_steps=8), 0, 16)["x0"])


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", {"name": "unified", "preset": "unipc"}])
def test_dps_guides_solvers_with_a_memory_too(solver):
    plain, guided = (
        generate(recipe(s, num_steps=20, solver=solver), 0, 256)["x0"] for s in ("single", {"name": "dps"})
    )
    still = generate(recipe({"name": "dps", "zeta": 0.0}, num_steps=20, solver=solver), 0, 256)["x0"]
    np.testing.assert_array_equal(still, plain)
    misfit = [np.abs(x @ np.array(A)[0] - Y[0]).mean() for x in (plain, guided)]
    assert misfit[1] < misfit[0] / 2


def test_dps_takes_the_gradient_of_the_norm_of_the_predicted_residual():
    # One Gaussian in one dimension: x0_hat is linear in x, so one guided step is known by hand.
    model = {"name": "gmm", "means": [[0.3]], "covariances": [[0.5]]}
    reward = {"name": "measurement", "operator": "all", "y": [1.2], "sigma_y": 0.1, "model": model}
    made = recipe({"name": "dps", "zeta": 0.7}, model, num_steps=1, reward=reward)
    process = made.parts.model.noising
    alpha, sigma = process.alpha(1.0), process.sigma(1.0)
    slope = alpha * 0.5 / (alpha**2 * 0.5 + sigma**2)
    x1 = RowNoise(0, torch.arange(4), dtype=torch.float64).at(-1).normal((1,), "prior").numpy()
    x0 = 0.3 + slope * (x1 - alpha * 0.3)
    expected = x0 + 0.7 * np.sign(1.2 - x0) * slope
    np.testing.assert_allclose(generate(made, 0, 4)["x0"], expected, rtol=1e-10)


def test_guidance_restores_digits():
    spec = {"name": "measurement", "operator": "blur", "sigma_y": 0.1}
    fields = {"model": "digits", "reward": spec, "batch_size": 16, "dtype": "float32"}

    def psnr(strategy, steps):
        rows = generate(recipe(strategy, num_steps=steps, **fields), 0, 16)
        return score({"name": "recovery_psnr"}, rows["x0"], rows["label"], 0, 16, "cpu").mean()

    plain = psnr("single", 12)
    assert psnr({"name": "dps", "zeta": 4.0}, 12) > plain + 5  # 8.9 dB became 18.3, and 20.8 with afdps
    assert psnr({"name": "afdps", "n": 4}, 12) > plain + 5


# --- rows, accounts, refusals ----------------------------------------------------------------------------------------

STRATEGIES = [
    {"name": "dps"},
    {"name": "afdps", "n": 4},
    {"name": "active_sampling", "n": 4, "acquisitions": 2, "window": [0.0, 0.5]},
]
EVERY = pytest.mark.parametrize("strategy", STRATEGIES, ids=[s["name"] for s in STRATEGIES])
OWN = {"name": "measurement", "operator": "all", "sigma_y": 0.5, "model": MIXTURE}


@EVERY
def test_rows_do_not_depend_on_their_batch_mates(strategy):
    made = recipe(strategy, num_steps=6, reward=OWN, batch_size=16)
    whole = generate(made, 3, 35)
    pieces = [generate(made, a, b) for a, b in ((3, 4), (4, 17), (17, 35))]
    for name in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), whole[name], err_msg=name)
    alone = generate(made, 9, 10, isolated=True)
    np.testing.assert_array_equal(alone["x0"][0], whole["x0"][6])
    wider = generate(recipe(strategy, num_steps=6, reward=OWN, batch_size=64), 3, 35)
    np.testing.assert_allclose(wider["x0"], whole["x0"], rtol=1e-9, atol=1e-9)


@EVERY
def test_the_account_is_what_the_rows_cost(strategy):
    made = recipe(strategy, num_steps=6, reward=OWN, batch_size=16)
    rows = generate(made, 0, 8)
    account = made.parts.strategy.account([1] * 6)
    assert account.exact
    assert (rows["nfe"] == account.nfe).all() and (rows["reward_calls"] == account.reward_calls).all()
    assert account.gradients == (0 if strategy["name"] == "afdps" else account.nfe)


def test_dps_and_active_sampling_look_through_a_network():
    fields = {"model": "digits", "reward": "measurement", "batch_size": 8, "dtype": "float32", "num_steps": 3}
    for strategy in ({"name": "dps"}, {"name": "active_sampling", "n": 2, "acquisitions": 1}):
        rows = generate(recipe(strategy, **fields), 0, 4)
        assert np.isfinite(rows["x0"]).all() and (rows["nfe"] == 3 * strategy.get("n", 1)).all()


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("dps", {"reward": "quadratic"}, "strategy dps needs a measurement to fit, but the reward is quadratic"),
        ("dps", {"reward": None}, "strategy dps needs a reward"),
        ("dps", {"solver": "diffusers", "times": "stock"}, "which solver diffusers does not give"),
        ("dps", {"times": {"name": "travel"}}, "cannot follow times travel, which rise"),
        ("afdps", {"solver": "ddim"}, "strategy afdps weighs ancestral steps, but the solver is ddim"),
        ("afdps", {"solver": "flow_sde"}, "afdps weighs ancestral steps, but the solver is flow_sde"),
        ("afdps", {"reward": "jpeg_compressibility"}, "gradient of its reward, which jpeg_compressibility does"),
        ({"name": "afdps", "kappa": 1.0}, {"reward": "quadratic"}, "needs the reward's Laplacian, which quadratic"),
        ({"name": "active_sampling", "acquisitions": 3}, {"reward": OWN}, "but the measurement has 2 entries"),
        ({"name": "afdps", "n": 0}, {}, "strategy.n must be at least 1, got 0"),
        ({"name": "afdps", "strength": 0.0}, {}, "strategy.strength must be positive, got 0.0"),
        ({"name": "afdps", "kappa": 2.0}, {}, "strategy.kappa must be between 0 and 1"),
        ({"name": "afdps", "threshold": 2.0}, {}, "strategy.threshold must be between 0 and 1"),
        ({"name": "dps", "zeta": -1.0}, {}, "strategy.zeta must be at least 0, got -1.0"),
        ({"name": "active_sampling", "n": 1}, {}, "strategy.n must be at least 2"),
        ({"name": "active_sampling", "window": [0.5, 0.5]}, {}, "strategy.window must be two numbers"),
    ],
)
def test_impossible_pairings_are_refused(strategy, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(strategy, **changes)
