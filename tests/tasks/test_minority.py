"""The minority score, and steering by it, against closed forms."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.minority import minority_score
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate

torch.set_num_threads(1)

RARE_MODE = {"name": "gmm", "weights": [0.9, 0.1], "means": [[0.0], [2.0]], "covariances": [[0.25], [0.25]]}
VARIANCE = 0.8
GAUSSIAN = {"name": "gmm", "means": [[0.0]], "covariances": [[VARIANCE]]}


def recipe(strategy, **changes):
    fields = {"model": GAUSSIAN, "solver": {"name": "ddim", "eta": 1.0}, "guidance": "none", "strategy": strategy}
    fields |= {"times": {"name": "uniform", "num_steps": 100}, "batch_size": 4096, "dtype": "float64"}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def time_of(process, sigma):
    """The time of a variance-preserving process at which sigma has a value."""
    return process.time(math.log(math.sqrt(1 - sigma**2) / sigma))


def line(process, time):
    """x - x0_hat of one Gaussian is a x - b eps: (a, b)."""
    alpha, sigma = process.alpha(time), process.sigma(time)
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    return 1 - gain * alpha, gain * sigma


@pytest.mark.parametrize(("sigma", "correlation"), [(0.3, 0.24), (0.6, 0.71), (0.9, 0.96)])
def test_the_score_of_a_gaussian_is_its_closed_form_and_follows_minus_log_density(sigma, correlation):
    draws, count = 5, 8000
    spec = registry.models.build(GAUSSIAN)
    model, time = spec.load("cpu"), time_of(spec.noising, sigma)
    noise = RowNoise(0, torch.arange(count), dtype=torch.float64)
    x0 = math.sqrt(VARIANCE) * noise.normal((1,), "data")
    found = minority_score(model, x0, None, time, draws, noise)
    a, b = line(spec.noising, time)
    exact, scatter = a**2 * x0[:, 0] ** 2 + b**2, (4 * a**2 * b**2 * x0[:, 0] ** 2 + 2 * b**4) / draws
    assert (found - exact).mean() == pytest.approx(0, abs=5 * math.sqrt(scatter.mean() / count))
    # Cov(m, x^2) = 2 a^2 v^2 and Var m = 2 a^4 v^2 + (4 a^2 b^2 v + 2 b^4) / draws.
    spread = 2 * a**4 * VARIANCE**2 + (4 * a**2 * b**2 * VARIANCE + 2 * b**4) / draws
    expected = 2 * a**2 * VARIANCE**2 / math.sqrt(2 * VARIANCE**2 * spread)
    assert expected == pytest.approx(correlation, abs=0.02)
    measured = np.corrcoef(found, -model.log_density(x0, 0.0))[0, 1]
    assert measured == pytest.approx(expected, abs=10 * (1 - expected**2) / math.sqrt(count) + 0.01)


def test_on_a_mixture_the_score_follows_minus_log_density_more_closely_at_more_noise():
    spec = registry.models.build(RARE_MODE)
    model, x0 = spec.load("cpu"), torch.from_numpy(spec.reference(4000)[0]).double()
    noise, rare = RowNoise(0, torch.arange(4000), dtype=torch.float64), -model.log_density(x0, 0.0)
    found = [
        np.corrcoef(minority_score(model, x0, None, time_of(spec.noising, sigma), 5, noise), rare)[0, 1]
        for sigma in (0.3, 0.6, 0.9)
    ]
    assert found == pytest.approx([0.45, 0.76, 0.82], abs=0.06)


def test_particles_follow_the_tilt_of_a_gaussian_by_its_score():
    strength, draws, particles = 0.5, 5, 64
    made = recipe(
        {"name": "minority", "n": particles, "strength": strength, "time": 0.3, "draws": draws, "interval": 10}
    )
    process = made.parts.model.noising
    a, b = line(process, 0.3)
    # The last score is an estimate, a mean of (a x - b eps_k)^2: what particles are weighted by is its moment E exp(.).
    s = strength / draws
    narrowed = 1 - 2 * s * b**2
    assert narrowed > 0
    precision = 1 / VARIANCE - 2 * strength * a**2 / narrowed
    log_z = -0.5 * draws * math.log(narrowed) - 0.5 * math.log(precision * VARIANCE)
    rows = generate(made, 0, 1024)
    variance = 1 / precision
    assert variance > 1.2 * VARIANCE
    assert rows["x0"].var() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / 1024) + 0.02)
    z = np.exp(rows["log_z"])
    assert math.log(z.mean()) == pytest.approx(log_z, abs=5 * z.std() / z.mean() / 32 + 0.02)


def test_samples_become_rarer():
    spec = registry.models.build(RARE_MODE)
    model, time = spec.load("cpu"), time_of(spec.noising, 0.9)
    fields = {"model": RARE_MODE}
    plain = generate(recipe("single", **fields), 0, 1024)
    steered = generate(recipe({"name": "minority", "n": 8, "strength": 2.0, "time": time}, **fields), 0, 1024)
    rare = [-model.log_density(torch.from_numpy(rows["x0"]), 0.0).numpy() for rows in (plain, steered)]
    error = math.hypot(*(r.std() / 32 for r in rare))
    assert rare[1].mean() - rare[0].mean() > 5 * error


def test_one_particle_is_single_draw_for_draw_and_scores_nothing():
    one, plain = (generate(recipe(s), 0, 16) for s in ({"name": "minority", "n": 1}, "single"))
    np.testing.assert_array_equal(one["x0"], plain["x0"])
    np.testing.assert_array_equal(one["nfe"], plain["nfe"])
    recipe({"name": "minority", "n": 1}, solver="ddim")  # and any solver will do


def test_the_account_is_what_the_rows_cost():
    for n, interval, steps in ((1, 2, 7), (3, 2, 8), (3, 3, 8), (2, 20, 8)):
        made = recipe(
            {"name": "minority", "n": n, "interval": interval},
            times={"name": "uniform", "num_steps": steps},
            batch_size=12,
        )
        assert (generate(made, 0, 4)["nfe"] == made.parts.strategy.account([1] * steps).nfe).all()


def test_rows_do_not_depend_on_how_the_range_is_split():
    made = recipe({"name": "minority", "n": 3}, times={"name": "uniform", "num_steps": 12}, batch_size=16)
    whole = generate(made, 2, 20)
    pieces = [generate(made, a, b) for a, b in ((2, 3), (3, 9), (9, 20))]
    for name in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), whole[name], err_msg=name)


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ({"n": 0}, {}, "got 0, 5 and 5"),
        ({"strength": 0.0}, {}, "strategy.strength must be positive, got 0.0"),
        ({"time": 1.0}, {}, "0 < strategy.time < 1"),
        ({}, {"solver": "ddim"}, "copies particles, but ddim is deterministic"),
        ({}, {"model": "table", "solver": "ancestral"}, "but model table has tokens"),
    ],
)
def test_impossible_settings_are_refused(strategy, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe({"name": "minority"} | strategy, **changes)
