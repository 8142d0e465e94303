"""Anchored posterior sampling of tokens against the enumerated posterior; and the measurement of products."""

import math

import numpy as np
import pytest
import torch
from token_oracles import TOK, distance, noise_of, sampler_of, sampling_error, shares

from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedReward

SPEC = registry.models.describe(TOK)
INPAINT = {"name": "measurement", "operator": "matrix", "matrix": [[0, 1, 0, 0], [0, 0, 0, 1]], "sigma_y": 0.2}
INPAINT |= {"y": [1.0, 2.0], "model": SPEC}
SUM = {"name": "measurement", "operator": "matrix", "matrix": [[1, 1, 1, 1]], "sigma_y": 0.5, "y": [5.0], "model": SPEC}
PRODUCTS = {"name": "neighbour_products", "sigma_y": 0.5, "y": [2.0, 0.0, 0.0], "model": SPEC}


def posterior(spec):
    likelihood = registry.rewards.build(spec).at(torch.arange(81))(torch.from_numpy(TOK.strings)).numpy()
    found = TOK.joint * np.exp(likelihood - likelihood.max())
    return found / found.sum()


def run(spec, steps, rows, **fields):
    noise = noise_of(rows)
    strategy = registry.strategies.build({"name": "anchored_posterior"} | fields)
    reward = CountedReward(registry.rewards.build(spec), spec["name"], noise.indices)
    return strategy(sampler_of("ancestral", steps), reward, noise)


def test_inpainting_one_token_a_step_is_the_posterior_up_to_sampling_error():
    rows = 600
    exact = posterior(INPAINT)
    assert distance(shares(run(INPAINT, 4, rows, inner_steps=50).x0), exact) < sampling_error(exact, rows)
    assert distance(TOK.joint, exact) > 0.9


def test_the_likelihood_of_the_expected_string_alone_is_biased():
    # A place that should be 1 is drawn as 0 or 2 as well: the published form does not see the spread.
    found = distance(shares(run(INPAINT, 4, 200, inner_steps=50, curvature=False).x0), posterior(INPAINT))
    assert found > 0.7  # .86 measured


# Measured on 2000 rows at 8 steps and 100 inner ones: .22 from a prior's .52, and .23 from .92. Biased: see the class.
@pytest.mark.parametrize(("spec", "most", "prior"), [(SUM, 0.3, 0.52), (PRODUCTS, 0.35, 0.91)], ids=["sum", "products"])
def test_coupled_measurements_come_nearer_to_the_posterior(spec, most, prior):
    rows, exact = 400, posterior(spec)
    assert distance(TOK.joint, exact) > prior - 0.01
    found = run(spec, 8, rows, inner_steps=50)
    off = distance(shares(found.x0), exact)
    assert off < most
    likelihood = registry.rewards.build(spec).at(torch.arange(81))(torch.from_numpy(TOK.strings)).numpy()
    assert float(found.columns["log_likelihood"].mean()) > exact @ likelihood - 1 > TOK.joint @ likelihood + 5


def test_rows_do_not_see_each_other():
    whole = run(PRODUCTS, 3, 6, inner_steps=20).x0
    noise = noise_of(6)
    alone = registry.strategies.build({"name": "anchored_posterior", "inner_steps": 20})(
        sampler_of("ancestral", 3),
        CountedReward(registry.rewards.build(PRODUCTS), "products", noise.indices[4:5]),
        type(noise)(0, noise.indices[4:5], dtype=torch.float64),
    ).x0
    assert torch.equal(alone[0], whole[4])


def test_products_of_neighbours_are_measured_of_the_row_s_own_item():
    reward = registry.rewards.build({"name": "neighbour_products", "model": SPEC, "sigma_y": 1e-3})
    items = torch.from_numpy(TOK.reference(8)[0])
    own = reward.at(torch.arange(8))(items)
    shifted = reward.at(torch.arange(8))(items.flip(1) + 1)
    assert (own > shifted).all()
    y = (items[:, 1:] * items[:, :-1]).double()
    given = registry.rewards.build(PRODUCTS).at(torch.arange(8))(items)
    expected = torch.distributions.Normal(y, 0.5).log_prob(torch.tensor([2.0, 0.0, 0.0])).sum(1)
    torch.testing.assert_close(given, expected.double())
    with pytest.raises(ValueError, match="without their rows"):
        reward(items, None)


def recipe(**fields):
    base = {
        "model": SPEC,
        "solver": "ancestral",
        "times": {"name": "uniform", "num_steps": 3},
        "guidance": "none",
        "strategy": {"name": "anchored_posterior", "inner_steps": 10},
        "reward": PRODUCTS,
    }
    return Recipe(**(base | fields)).completed()


def test_it_runs_as_a_recipe_and_counts_its_calls():
    made = recipe()
    made.check()
    rows = generate(made, 0, 4)
    # Each step: 10 gradient steps, the curvature once, and every place left out; then the sample itself.
    assert (rows["nfe"] == 3).all()
    assert (rows["reward_calls"] == 3 * (10 + 1 + 5) + 1).all()
    assert made.account.reward_calls <= rows["reward_calls"][0]
    capped = recipe(strategy={"name": "anchored_posterior", "inner_steps": 10, "budget": {"reward_calls": 48}})
    with pytest.raises(ValueError, match="makes 49 reward calls a sample, above strategy.budget.reward_calls=48"):
        capped.check()
    assert ((rows["x0"] >= 0) & (rows["x0"] < 3)).all()


DIGITS = [
    {"name": "measurement", "operator": "inpaint", "sigma_y": 0.1},
    {"name": "neighbour_products", "sigma_y": 0.1},
]


@pytest.mark.parametrize("reward", DIGITS, ids=lambda spec: spec["name"])
def test_digits_agree_with_what_was_measured_of_them(reward):
    # Expected levels are decoded to grey values between the 17, so that the likelihood can be differentiated.
    fields = {"model": {"name": "digits_tokens"}, "reward": reward | {"model": {"name": "digits_tokens"}}}
    fields |= {"labels": None, "batch_size": 4, "times": {"name": "uniform", "num_steps": 4}}
    made = recipe(**fields, strategy={"name": "anchored_posterior", "inner_steps": 15})
    made.check()
    restored = generate(made, 0, 4)
    free = generate(recipe(**fields, strategy="single"), 0, 4)["x0"]
    likelihood = made.parts.reward.at(torch.arange(4))
    assert (restored["log_likelihood"] > likelihood(torch.from_numpy(free)).numpy() + 100).all()
    np.testing.assert_allclose(restored["log_likelihood"], likelihood(torch.from_numpy(restored["x0"])), rtol=1e-5)
    levels = (restored["x0"] + 1) * 8
    assert np.array_equal(levels, levels.round()), "samples are tokens"


REFUSED = [
    ({"solver": "first_hitting"}, "takes the place of ancestral steps on masked tokens"),
    ({"solver": {"name": "ancestral", "filters": [{"name": "top_p"}]}}, "settings of solver ancestral have no effect"),
    ({"reward": {"name": "class_correct"}}, "class_correct"),
    ({"reward": None}, "needs a reward"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused_when_planning(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(**fields).check()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="inner_steps >= 1"):
        registry.strategies.build({"name": "anchored_posterior", "inner_steps": 0})
    with pytest.raises(ValueError, match="must be 3 products of neighbours"):
        registry.rewards.build({"name": "neighbour_products", "model": SPEC, "y": [1.0]})
    assert math.isclose(registry.strategies.build("anchored_posterior").anchor, 1.0)
