"""Soft value-based decoding: what the exact value reaches, and how far the posterior mean stays away."""

import math

import numpy as np
import pytest
import torch
from oracles import GM1D, Denoiser, ExactKernel, uniform

from tasks.noise import RowNoise
from tasks.processes import VP
from tasks.recipe import Recipe
from tasks.registry import rewards, strategies
from tasks.run import generate
from tasks.sampler import CountedModel, CountedReward, Sampler

MEAN, VARIANCE, _ = GM1D.tilted()


def chains(rows, exact=False, steps=20, **fields):
    """Mean, its standard error, and variance of chains on the exact kernel."""
    strategy = strategies.build(
        {"name": "svdd", "children": 20, "strength": 2.0, "selection": "softmax", "select_last": True} | fields
    )
    model = Denoiser(GM1D, VP())
    sampler = Sampler(model, ExactKernel(GM1D), uniform(steps))
    noise = RowNoise(0, torch.arange(rows), dtype=torch.float64)
    if exact:
        result = strategy.decode(
            sampler, lambda children, _, __: GM1D.value(VP(), children.x, sampler.times[children.step]), noise
        )
    else:
        result = strategy(sampler, rewards.build(GM1D.reward()), noise)
    x = result.x0[:, 0]
    return float(x.mean()), float(x.std()) / math.sqrt(rows), float(x.var())


@pytest.mark.parametrize(("children", "mean", "variance"), [(2, 0.677, 1.829), (5, 1.121, 0.861), (20, 1.225, 0.655)])
def test_the_exact_value_leaves_a_bias_of_one_over_the_children(children, mean, variance):
    found, error, spread = chains(6000, exact=True, children=children)
    assert abs(found - mean) < 0.01 + 4 * error
    assert abs(spread - variance) < 0.02 + 6 * variance * math.sqrt(2 / 6000)


def test_a_last_step_without_a_choice_leaves_the_known_width():
    found, error, spread = chains(3000, exact=True, select_last=False)
    assert abs(found - 1.214) < 0.01 + 4 * error
    assert abs(spread - 0.720) < 0.02 + 6 * 0.72 * math.sqrt(2 / 3000)


def test_a_hundred_children_come_closer_than_five():
    far, near = chains(3000, exact=True, children=5), chains(3000, exact=True, children=100)
    assert abs(near[0] - MEAN) < 0.015 + 4 * near[1] < abs(far[0] - MEAN)
    assert abs(near[2] - VARIANCE) < 0.08


def test_the_posterior_mean_has_a_bias_that_stays():
    # Jensen's gap: with a correct value this test fails.
    for children, wanted in ((20, 1.525), (100, 1.513)):
        mean, error, _ = chains(4000 if children == 20 else 1500, children=children)
        assert abs(mean - wanted) < 0.03 + 3 * error
        assert mean - MEAN > 0.2


def test_rollouts_take_the_gap_away():
    # 16 rollouts and 8 children; the posterior mean with as many children is .25 further on.
    mean, error, _ = chains(500, children=8, value="monte_carlo", rollouts=16, steps=8)
    biased, _, _ = chains(2000, children=8, steps=8)
    exact, spread, _ = chains(4000, exact=True, children=8, steps=8)
    assert abs(mean - exact) < 4 * math.hypot(error, spread) + 0.03
    assert biased - mean > 0.1


def test_rollouts_do_not_foresee_the_noise_to_come():
    # One rollout per child and a strong choice: were it the child's own future, the end would be its reward.
    rows, m = 600, 4
    seen = []

    class Reward:
        def __call__(self, samples, cond):
            seen.append(samples[:, 0].clone())
            return -((samples[:, 0] - 1.5) ** 2) / 2

    strategy = strategies.build({"name": "svdd", "children": m, "value": "monte_carlo"})
    sampler = Sampler(Denoiser(GM1D, VP()), ExactKernel(GM1D), uniform(2))
    ends = strategy(sampler, Reward(), RowNoise(0, torch.arange(rows), dtype=torch.float64)).x0[:, 0]
    rollouts = seen[0].view(rows, m)
    assert (rollouts - ends[:, None]).abs().min() > 0  # none of them is the end itself


def test_argmax_collapses_onto_the_mode():
    mean, _, variance = chains(1000, selection="argmax")
    assert variance < 0.02 and abs(mean - 1.5) < 0.01
    assert strategies.build({"name": "svdd", "selection": "argmax"}).semantics == "best"
    assert strategies.build({"name": "svdd", "selection": "softmax"}).semantics == "sample"


@pytest.mark.parametrize(
    "fields",
    [{}, {"select_last": False}, {"children": 3}, {"value": "monte_carlo", "rollouts": 3, "children": 4}],
    ids=str,
)
def test_the_account_is_what_is_spent(fields):
    strategy = strategies.build({"name": "svdd", "select_last": True} | fields)
    model = CountedModel(Denoiser(GM1D, VP()), 10**6)
    reward = CountedReward(rewards.build(GM1D.reward()), "quadratic")
    sampler = Sampler(model, ExactKernel(GM1D), uniform(6))
    strategy(sampler, reward, RowNoise(0, torch.arange(5), dtype=torch.float64))
    account = strategy.account([1] * 6)
    assert (model.rows, reward.rows) == (5 * account.nfe, 5 * account.reward_calls)
    if "value" not in fields:
        assert account.nfe == strategy.children * 5 + 1


# --- as a part of a recipe -------------------------------------------------------------------------------------------


def recipe(**changes):
    fields = {
        "model": "gmm",
        "solver": {"name": "ddim", "eta": 1.0},
        "guidance": "none",
        "reward": "ink",
        "times": {"name": "uniform", "num_steps": 6},
        "batch_size": 16,
        "strategy": {"name": "svdd", "children": 4},
    }
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


@pytest.mark.parametrize("model", ["gmm", "table", "digits"])
def test_one_child_is_single_draw_for_draw(model):
    fields = {"model": model, "solver": "ancestral" if model == "table" else {"name": "ddim", "eta": 1.0}}
    one = generate(recipe(**fields, strategy={"name": "svdd", "children": 1}), 0, 6)
    single = generate(recipe(**fields, strategy="single"), 0, 6)
    assert one.keys() == single.keys()
    np.testing.assert_array_equal(one["x0"], single["x0"])


def test_tokens_are_pulled_towards_the_reward_and_rows_do_not_depend_on_the_split():
    strategy = {"name": "svdd", "children": 8, "predictions": 2, "strength": 30.0, "selection": "softmax"}
    made = recipe(model="table", solver="ancestral", strategy=strategy)
    rows = generate(made, 0, 40)
    plain = generate(recipe(model="table", solver="ancestral", strategy="single"), 0, 40)
    assert rows["x0"].mean() > plain["x0"].mean() + 0.2
    again = np.concatenate([generate(made, 0, 7)["x0"], generate(made, 7, 40)["x0"]])
    np.testing.assert_array_equal(rows["x0"], again)
    assert (rows["reward_calls"] == 8 * 5 * 2).all() and (rows["nfe"] == 8 * 5 + 1).all()


def test_solvers_that_cannot_use_a_prediction_are_refused():
    with pytest.raises(ValueError, match="more than one evaluation at its state. Solvers that fit: ddim"):
        recipe(solver={"name": "unified", "preset": "dpmpp_2m_sde"})
    with pytest.raises(ValueError, match="svdd copies particles, but ddim is deterministic"):
        recipe(solver="ddim")
    for fields, message in (
        ({"children": 0}, "must be at least 1, got 0"),
        ({"strength": -1.0}, "must be positive, got -1.0"),
        ({"selection": "max"}, "unknown selection 'max'"),
        ({"value": "exact"}, "unknown value 'exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            strategies.build({"name": "svdd"} | fields)
