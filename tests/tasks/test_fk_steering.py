"""Feynman-Kac steering against tilted mixtures and a tilted table."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import GM1D, Denoiser, ExactKernel, log_mean, uniform, weighted_moments

from tasks import smc
from tasks.noise import RowNoise
from tasks.processes import VP, Flow
from tasks.recipe import Recipe
from tasks.registry import models, rewards, solvers, strategies
from tasks.run import generate
from tasks.sampler import CountedModel, CountedReward, Sampler

MEAN, VARIANCE, LOG_Z = GM1D.tilted()
FIELDS = {"name": "fk_steering", "strength": 2.0, "every": 4, "first": 4, "lag": False, "output": "all"}


def steer(rows, count, steps=20, process=VP, **fields):
    """Every particle of FK steering on the exact kernel: group means and variances, log Z, samples."""
    strategy = strategies.build(FIELDS | {"particles": count} | fields)
    sampler = Sampler(Denoiser(GM1D, process()), ExactKernel(GM1D), uniform(steps))
    noise = RowNoise(3, torch.arange(rows), dtype=torch.float64)
    return strategy(sampler, rewards.build(GM1D.reward()), noise)


def moments(result, count):
    x = result.columns["candidates"].view(-1, count)
    mean, variance = weighted_moments(x, result.columns["log_weights"])
    return mean, variance, float(mean.std()) / math.sqrt(len(mean))


@pytest.mark.parametrize("lag", [False, True])
def test_difference_potentials_reach_the_tilted_law(lag):
    result = steer(60, 1024, lag=lag)
    mean, variance, error = moments(result, 1024)
    assert error < 0.02
    assert abs(mean.mean() - 1.29) < 0.04 + 2 * error  # the bias at 1024 particles is .04 and falls with K
    assert abs(variance.mean() - 0.636) < 0.05
    log_z, error = log_mean(result.columns["log_z"])
    assert abs(log_z + 1.61) < 0.05 + 3 * error


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_weights_that_are_not_spent_are_carried(potential):
    # On a flow, where dropping them shows for both: difference .91 in the variance, max -.14 in the mean.
    result = steer(100, 256, process=Flow, potential=potential, trigger="ess")
    mean, variance, error = moments(result, 256)
    assert abs(mean.mean() - MEAN) < 0.06 + 4 * error
    assert abs(variance.mean() - VARIANCE) < 0.05


def test_dropping_the_weights_of_groups_that_are_not_resampled_is_seen(monkeypatch):
    resample = smc.ParticleState.resample

    def forgets(self, how, noise):
        after = resample(self, how, noise)
        return replace(after, log_w=torch.zeros_like(after.log_w))

    monkeypatch.setattr(smc.ParticleState, "resample", forgets)
    mean, _, error = moments(steer(100, 256, potential="max", trigger="ess"), 256)
    assert abs(mean.mean() - MEAN) > 0.4 > 10 * error


@pytest.mark.parametrize(("potential", "scale"), [("max", 1 / 4), ("immediate", 1 / 4), ("sum", 2 / 16)])
def test_scaled_potentials_reach_the_tilted_law_with_64_particles(potential, scale):
    result = steer(1200, 64, potential=potential, potential_scale=scale)
    mean, variance, error = moments(result, 64)
    assert error < 0.006
    assert abs(mean.mean() - MEAN) < 0.02 + 4 * error and abs(variance.mean() - VARIANCE) < 0.03
    log_z, error = log_mean(result.columns["log_z"])
    assert abs(log_z - LOG_Z) < 5 * error < 0.05


@pytest.mark.parametrize(("potential", "figure"), [("max", 1.271), ("immediate", 1.361), ("sum", 1.449)])
def test_potentials_at_full_strength_are_as_far_off_at_1024_particles_as_measured(potential, figure):
    mean, _, error = moments(steer(60, 1024, potential=potential), 1024)
    assert abs(mean.mean() - figure) < 0.03 + 4 * error < 0.2


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_paths_without_resampling_weigh_their_end_alone(potential):
    result = steer(20, 32, potential=potential, trigger="never")
    x = result.columns["candidates"].view(20, 32)
    exact = torch.log_softmax(-2.0 * (x - 1.5) ** 2 / 2, dim=1)
    assert torch.allclose(result.columns["log_weights"], exact, atol=1e-12)
    assert torch.allclose(result.columns["log_z"], torch.logsumexp(-((x - 1.5) ** 2), dim=1) - math.log(32), atol=1e-12)
    assert (result.columns["unique_ancestors"] == 32).all()


def test_a_sample_is_drawn_by_weight_and_the_best_has_the_largest_reward():
    result = steer(1500, 64, potential="max", potential_scale=0.25)
    x = result.x0[:, 0]
    assert abs(x.mean() - MEAN) < 0.01 + 4 * math.sqrt(VARIANCE / 1500)
    assert abs(x.var() - VARIANCE) < 0.1
    best = steer(50, 64, output="best")
    assert torch.equal(best.columns["slot"], best.columns["candidate_rewards"].argmax(1))
    assert (best.x0[:, 0] - 1.5).abs().mean() < 0.1
    assert strategies.build(FIELDS | {"output": "best"}).semantics == "best"
    assert strategies.build(FIELDS).semantics == "sample"


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [True, False])
def test_tokens_are_steered_to_the_tilted_table(lag):
    table = {"name": "table", "seed": 3}
    spec = models.build(table)
    rows, count, steps = 250, 64, 64

    def zeros(samples, cond):
        return (samples == 0).sum(1).double()

    fields = {"every": 8, "first": 8, "predictions": 2, "lag": lag, "strength": 1.0, "particles": count}
    strategy = strategies.build(FIELDS | fields)
    model = CountedModel(spec.load("cpu"), 10**6)
    sampler = Sampler(model, solvers.build("ancestral"), uniform(steps))
    reward = CountedReward(zeros, "zeros")
    result = strategy(sampler, reward, RowNoise(0, torch.arange(rows), dtype=torch.float64))
    weights = spec.joint * np.exp((spec.strings == 0).sum(1))
    tokens = result.columns["candidates"].long().view(-1, 4)
    index = (tokens * torch.tensor([27, 9, 3, 1])).sum(1)
    shares = torch.exp(result.columns["log_weights"]).flatten() / rows
    found = torch.zeros(81, dtype=torch.float64).index_add_(0, index, shares)
    exact = weights / weights.sum()
    assert 0.5 * (found - torch.from_numpy(exact)).abs().sum() < 0.06
    log_z, error = log_mean(result.columns["log_z"])
    assert abs(log_z - math.log(weights.sum())) < 5 * error + 0.02  # 0.02: a factorised step of 64
    account = strategy.account([1] * steps)
    assert (model.rows, reward.rows) == (rows * account.nfe, rows * account.reward_calls)


# --- as a part of a recipe -------------------------------------------------------------------------------------------


def recipe(**changes):
    fields = {
        "model": "gmm",
        "solver": {"name": "ddim", "eta": 1.0},
        "guidance": "none",
        "reward": "ink",
        "times": {"name": "uniform", "num_steps": 8},
        "batch_size": 16,
        "strategy": {"name": "fk_steering", "every": 2, "first": 2},
    }
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


@pytest.mark.parametrize("model", ["gmm", "table", "digits"])
def test_one_particle_is_single_draw_for_draw(model):
    fields = {"model": model, "solver": "ancestral" if model == "table" else {"name": "ddim", "eta": 1.0}}
    one = generate(recipe(**fields, strategy={"name": "fk_steering", "particles": 1}), 0, 6)
    single = generate(recipe(**fields, strategy="single"), 0, 6)
    assert one.keys() == single.keys()
    np.testing.assert_array_equal(one["x0"], single["x0"])


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("solver", ["ddim", "unified"])
def test_rows_cost_what_the_account_says_and_do_not_depend_on_the_split(solver, lag):
    spec = {"name": "ddim", "eta": 1.0} if solver == "ddim" else {"name": "unified", "preset": "dpmpp_2m_sde"}
    strategy = {"name": "fk_steering", "every": 2, "first": 2, "lag": lag, "trigger": "ess", "threshold": 1.0}
    if solver == "unified" and not lag:
        with pytest.raises(ValueError, match="more than one evaluation at its state. Solvers that fit: ddim, flow_sde"):
            recipe(solver=spec, strategy=strategy)
        return
    made = recipe(solver=spec, strategy=strategy)
    rows = generate(made, 0, 10)
    account = made.parts.strategy.account([1] * 8)
    assert (rows["nfe"] == account.nfe).all() and account.nfe == 32
    assert (rows["reward_calls"] == account.reward_calls).all() and account.reward_calls == 4 * (3 + 1)
    again = np.concatenate([generate(made, 0, 3)["x0"], generate(made, 3, 10)["x0"]])
    np.testing.assert_array_equal(rows["x0"], again)
    assert rows["ess"].shape == (10, 4) and rows["log_z"].dtype == np.float64


def test_deterministic_solvers_and_impossible_fields_are_refused():
    with pytest.raises(ValueError, match="strategy fk_steering copies particles, but ddim is deterministic"):
        recipe(solver="ddim")
    windowed = {"name": "unified", "preset": "dpmpp_2m_sde", "window": [0, 2]}
    with pytest.raises(ValueError, match=r"copies stay identical .* outside solver.window=\[0, 2\].*window=null"):
        recipe(solver=windowed)
    recipe(solver=windowed, strategy={"name": "fk_steering", "particles": 1})
    with pytest.raises(ValueError, match="predictions=2, but a Gaussian process predicts one point"):
        recipe(strategy={"name": "fk_steering", "predictions": 2})
    for fields, message in (
        ({"particles": 0}, "strategy.particles must be at least 1, got 0"),
        ({"strength": 0.0}, "must be positive, got 0.0"),
        ({"potential": "mean"}, "unknown potential 'mean'"),
        ({"output": "all of it"}, "unknown output"),
        ({"every": 0}, "must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            strategies.build({"name": "fk_steering"} | fields)
