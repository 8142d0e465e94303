"""Tempered SMC with gradient twists against a tilted Gaussian."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import GAUSS, Denoiser, ExactKernel, log_mean, uniform, weighted_moments

from tasks import smc
from tasks.noise import RowNoise
from tasks.processes import Flow
from tasks.recipe import Recipe
from tasks.registry import rewards, strategies
from tasks.run import generate
from tasks.sampler import CountedModel, CountedReward, Sampler

MEAN, VARIANCE, LOG_Z = GAUSS.tilted()


def run(rows, count, steps=100, **fields):
    strategy = strategies.build({"name": "das", "particles": count, "strength": 4.0, "output": "all"} | fields)
    sampler = Sampler(Denoiser(GAUSS, Flow()), ExactKernel(GAUSS), uniform(steps))
    noise = RowNoise(1, torch.arange(rows), dtype=torch.float64)
    with torch.no_grad():
        return strategy(sampler, rewards.build(GAUSS.reward()), noise)


def moments(result, count):
    """Mean over runs of the weighted mean; its error; and the variance of a draw by weight, over all runs."""
    x = result.columns["candidates"].view(-1, count)
    mean, variance = weighted_moments(x, result.columns["log_weights"])
    pooled = variance.mean() + mean.var(unbiased=False)
    return float(mean.mean()), float(mean.std()) / math.sqrt(len(mean)), float(pooled)


@pytest.mark.parametrize("fields", [{}, {"tempering": "linear"}, {"tempering": "adaptive"}, {"clip": 0.3}], ids=str)
def test_sixteen_particles_reach_the_tilted_law(fields):
    result = run(1500, 16, **fields)
    mean, error, variance = moments(result, 16)
    assert error < 0.005
    assert abs(mean - MEAN) < 0.015 + 3 * error
    assert abs(variance - VARIANCE) < 0.02
    log_z, error = log_mean(result.columns["log_z"])
    assert abs(log_z - LOG_Z) < 0.02 + 3 * error and error < 0.006


def test_more_particles_take_the_bias_away():
    mean, error, variance = moments(run(150, 256), 256)
    assert abs(mean - MEAN) < 4 * error < 0.02
    assert abs(variance - VARIANCE) < 0.01


def test_twists_and_gradients_left_behind_by_resampling_are_seen(monkeypatch):
    kept = ("psi", "gradient", "move", "x0_hat")

    def forgets(self, index):
        moved = honest(self, index)
        return moved.put(**{name: self.cache[name] for name in kept if name in self.cache})

    honest = smc.ParticleState.reindex
    fields = {"trigger": "always", "scheme": "multinomial"}
    right, error, _ = moments(run(300, 16, **fields), 16)
    monkeypatch.setattr(smc.ParticleState, "reindex", forgets)
    wrong, _, _ = moments(run(300, 16, **fields), 16)
    assert abs(right - MEAN) < 0.05 + 3 * error
    assert abs(wrong - MEAN) > 0.2


def test_a_gradient_of_the_wrong_particle_is_no_bias_but_a_twist_of_one_is(monkeypatch):
    # q is evaluated, so any gradient is legal; the potentials are not free.
    honest = smc.ParticleState.reindex

    def swaps(name):
        return lambda self, index: (
            honest(self, index).put(**{name: honest(self, index).cache[name].roll(1, 0)})
            if name in self.cache
            else honest(self, index)
        )

    monkeypatch.setattr(smc.ParticleState, "reindex", swaps("psi"))
    wrong, _, _ = moments(run(300, 16, trigger="always"), 16)
    monkeypatch.setattr(smc.ParticleState, "reindex", swaps("gradient"))
    log_z, error = log_mean(run(1500, 16, steps=20, tempering="linear", trigger="always").columns["log_z"])
    assert abs(log_z - LOG_Z) < 5 * error < 0.1
    assert abs(wrong - MEAN) > 0.1


def test_the_temper_rises_to_one_and_the_adaptive_one_never_overtakes():
    power = strategies.build({"name": "das"}).tempers(100)
    assert power[0] == 0 and power[-1] == 1 and power[50] == pytest.approx(1.008**50 - 1) and max(power) == 1
    assert all(a <= b for a, b in zip(power, power[1:], strict=False))
    steep = {"steps": 20, "tempering": "adaptive", "gamma": 0.3}  # 1.3^19 - 1 is far above 1
    tight = run(50, 16, conditional=0.9999, **steep).columns["temper"]
    loose = run(50, 16, conditional=0.01, **steep).columns["temper"]
    assert (tight <= 1).all() and (loose == 1).all() and (tight < 0.9).float().mean() > 0.2
    assert (tight[1:] != tight[:-1]).any()  # every group has its own


def test_the_account_is_what_is_spent():
    strategy = strategies.build({"name": "das", "particles": 3})
    model = CountedModel(Denoiser(GAUSS, Flow()), 10**6)
    reward = CountedReward(rewards.build(GAUSS.reward()), "quadratic")
    sampler = Sampler(model, ExactKernel(GAUSS), uniform(6))
    strategy(sampler, reward, RowNoise(0, torch.arange(5), dtype=torch.float64))
    account = strategy.account([1] * 6)
    assert (model.rows, reward.rows) == (5 * account.nfe, 5 * account.reward_calls)
    assert (account.nfe, account.reward_calls, account.gradients) == (18, 21, 18)


# --- as a part of a recipe -------------------------------------------------------------------------------------------


def recipe(**changes):
    fields = {
        "model": "gmm",
        "solver": {"name": "ddim", "eta": 1.0},
        "guidance": "none",
        "reward": {"name": "quadratic", "center": 1.0},
        "times": {"name": "uniform", "num_steps": 6},
        "batch_size": 16,
        "strategy": {"name": "das", "gamma": 0.2},
    }
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


@pytest.mark.parametrize("model", ["gmm", "digits"])
def test_one_particle_is_single_draw_for_draw(model):
    one = generate(recipe(model=model, strategy={"name": "das", "particles": 1}), 0, 6)
    single = generate(recipe(model=model, strategy="single"), 0, 6)
    assert one.keys() == single.keys()
    np.testing.assert_array_equal(one["x0"], single["x0"])


@pytest.mark.parametrize("model", [{"name": "gmm"}, {"name": "gmm", "process": "flow"}, {"name": "digits"}], ids=str)
def test_rows_rise_in_reward_and_do_not_depend_on_the_split(model):
    made = recipe(model=model, solver="flow_sde" if model.get("process") == "flow" else {"name": "ddim", "eta": 1.0})
    rows = generate(made, 0, 9)
    plain = generate(replace(made, strategy={"name": "single"}).completed(), 0, 9)
    reward = made.parts.reward
    better = reward(torch.from_numpy(rows["x0"]), None) - reward(torch.from_numpy(plain["x0"]), None)
    assert better.mean() > 0
    again = np.concatenate([generate(made, 0, 5)["x0"], generate(made, 5, 9)["x0"]])
    np.testing.assert_array_equal(rows["x0"], again)
    assert (rows["nfe"] == 24).all() and (rows["reward_calls"] == 28).all()


def test_what_has_no_gradient_or_no_density_is_refused():
    with pytest.raises(ValueError, match="has none. Solvers that fit: ddim, flow_sde"):
        recipe(solver={"name": "unified", "preset": "dpmpp_2m_sde"})
    with pytest.raises(ValueError, match="das copies particles, but ddim is deterministic"):
        recipe(solver="ddim")
    with pytest.raises(ValueError, match="every step to be stochastic. Set solver.window=null"):
        recipe(model={"name": "gmm", "process": "flow"}, solver={"name": "flow_sde", "window": [0, 2]})
    with pytest.raises(ValueError, match="follows the gradient of the reward, but class_correct has none"):
        recipe(model="digits", reward="class_correct")
    for fields, message in (
        ({"particles": 0}, "strategy.particles must be at least 1, got 0"),
        ({"gamma": 0.0}, "must be positive"),
        ({"tempering": "steep"}, "unknown tempering 'steep'"),
        ({"conditional": 1.0}, "in \\(0, 1\\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            strategies.build({"name": "das"} | fields)
