"""Rollover budget forcing, and the paths and stochastic steps that it runs flows on."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.interpolants import coefficients, matched, predict, sde_step
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate

GM1D = {
    "name": "gmm",
    "means": [[-2.0], [0.5], [2.5]],
    "covariances": [[0.25], [0.09], [0.36]],
    "weights": [0.5, 0.3, 0.2],
}
WIDE = {"name": "gmm", "dim": 16, "num_components": 6, "seed": 3, "process": "flow"}


def recipe(**changes):
    fields = {"model": WIDE, "solver": "euler", "guidance": "none", "strategy": "single", "reward": "quadratic"}
    fields |= {"times": {"name": "uniform", "num_steps": 10}, "batch_size": 1024}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def rollover(**fields):
    return recipe(strategy={"name": "rollover"} | fields)


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_derivatives_of_a_path_are_its_derivatives(name):
    r, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    a, b, da, db = coefficients(name, r)
    for k, slope in ((0, da), (1, db)):
        difference = (coefficients(name, r + h)[k] - coefficients(name, r - h)[k]) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)
    t, scale = matched(name, r)
    np.testing.assert_allclose((1 - t) * scale, a, rtol=1e-12)
    np.testing.assert_allclose(t * scale, b, rtol=1e-12)


def marginal(path, norm, power, steps, rows=40000):
    """Samples of the one-dimensional mixture by the SDE on a path."""
    model = registry.models.build(GM1D | {"process": "flow"}).load("cpu")
    noise = RowNoise(0, torch.arange(rows), dtype=torch.float64)
    x = noise.at(-1).normal((1,), "prior")
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for i in range(steps):
        r, s = times[i].expand(rows), times[i + 1].expand(rows)
        x0_hat = predict(model, path, x, r, None)
        if i + 1 == steps:
            return x0_hat[:, 0].numpy()
        x = sde_step(path, x, x0_hat, r, s, norm * r**power, noise.at(i).normal((1,), "step"))


def within(x, variance):
    """Five standard errors of a sample variance."""
    error = math.sqrt(((x - x.mean()) ** 2).var() / len(x))
    return abs(x.var() - variance) < 5 * error + 0.005


@pytest.mark.parametrize(("norm", "power", "variance"), [(0.0, 1.0, 2.784), (3.0, 2.0, 3.199), (0.3, 0.0, 2.814)])
def test_ten_steps_on_the_straight_path_narrow_the_law_as_known(norm, power, variance):
    assert within(marginal("linear", norm, power, 10), variance)


@pytest.mark.parametrize(
    ("path", "norm", "power"), [("linear", 0.0, 1.0), ("linear", 3.0, 2.0), ("linear", 0.3, 0.0), ("vp", 3.0, 2.0)]
)
def test_every_diffusion_keeps_the_law_in_many_steps(path, norm, power):
    x = marginal(path, norm, power, 500, rows=8000)
    assert abs(x.mean() + 0.35) < 5 * 1.85 / math.sqrt(len(x)) + 0.02
    assert abs(x.var() - 3.41) < 0.05 + 5 * 3.5 / math.sqrt(len(x))


def test_no_diffusion_is_euler():
    model = registry.models.build(WIDE).load("cpu")
    x = RowNoise(0, torch.arange(5), dtype=torch.float64).normal((16,), "prior")
    r, s = torch.full((5,), 0.6, dtype=torch.float64), torch.full((5,), 0.45, dtype=torch.float64)
    x0_hat = model.denoise(x, 0.6, None)
    moved = sde_step("linear", x, x0_hat, r, s, torch.zeros(5), torch.zeros_like(x))
    np.testing.assert_allclose(moved, x + (0.45 - 0.6) * (x - x0_hat) / 0.6, rtol=1e-9, atol=1e-12)


# --- rollover --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize(("budget", "chains", "first"), [(100, 2, 5), (101, 2, 5), (37, 3, 2), (60, 1, 30)])
def test_the_budget_is_spent_to_the_last_evaluation(path, budget, chains, first):
    made = rollover(max_nfe=budget, chains=chains, first=first, path=path)
    rows = generate(made, 0, 20)
    assert (rows["nfe"] == budget).all()
    assert (rows["reward_calls"] == budget).all()
    assert (rows["quota_used"].sum(1) + chains * first == budget).all()  # nothing lost, nothing made up


def test_what_is_left_over_moves_to_the_next_step():
    rows = generate(rollover(max_nfe=97, chains=1, first=7), 0, 50)
    quota = (97 - 7) // 9
    used, accepted = rows["quota_used"], rows["accepted"]
    left = np.zeros(50, dtype=int)
    for step in range(8):
        assert (used[:, step] <= quota + left).all()
        early = accepted[:, step] == 1
        assert (used[~early, step] == (quota + left)[~early]).all()  # without a better child the quota is spent whole
        left = np.where(early, quota + left - used[:, step], 0)
    assert (used[:, 8] == quota + left).all()  # the last takes what there is
    assert 0 < accepted.mean() < 1


def test_the_reward_of_the_returned_sample_is_that_of_the_best_chain():
    rows = generate(rollover(max_nfe=50), 0, 20)
    reward = -((rows["x0"].astype(np.float64) - 1.5) ** 2).sum(1) / 2
    np.testing.assert_allclose(rows["candidate_rewards"].max(1), reward, rtol=1e-6)
    assert (rows["candidate_rewards"].argmax(1) == rows["slot"]).all()


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_rollover_beats_best_of_n_at_a_hundred_evaluations(path):
    near = {"reward": {"name": "quadratic", "center": 0.3}}  # a point among the data
    found = generate(rollover(max_nfe=100, path=path).override(near), 0, 300)["candidate_rewards"].max(1)
    best = generate(recipe(strategy={"name": "best_of_n", "n": 10}, **near), 0, 300)["candidate_rewards"].max(1)
    assert (found - best).mean() > 0.5 + 5 * (found - best).std() / math.sqrt(300)


def test_a_budget_of_reward_calls_lowers_the_predictions():
    rows = generate(rollover(max_nfe=200, budget={"reward_calls": 55, "nfe": 120}), 0, 5)
    assert (rows["nfe"] == 55).all()


def test_guidance_counts_towards_the_budget():
    made = rollover(max_nfe=200, budget={"nfe": 121}).override({"model": WIDE | {"labels": True}, "guidance": "cfg"})
    rows = generate(made, 0, 5)
    assert (rows["nfe"] == 120).all()
    assert (rows["reward_calls"] == 60).all()


def test_rollover_runs_on_the_digits_flow():
    made = recipe(
        model="digits_flow",
        reward="symmetry",
        batch_size=40,
        times={"name": "uniform", "num_steps": 5},
        strategy={"name": "rollover", "max_nfe": 20, "first": 3},
    )
    rows = generate(made, 0, 4)
    assert (rows["nfe"] == 20).all()
    assert np.isfinite(rows["x0"]).all()
