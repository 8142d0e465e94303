"""Learnable sampler distillation: what it fits, and that few-step laws come nearer to the table, by enumeration."""

import math

import numpy as np
import pytest
import torch
from token_oracles import TOK, Lookup, ancestral_law, distance, kernel, law, noise_of, sampler_of, shares, uniform

from tasks import calibration, registry
from tasks.models.table import Table
from tasks.recipe import Recipe
from tasks.run import generate

# Nearly always four equal tokens: the first one says the most, so short steps belong at the beginning.
EQUAL = (TOK.strings == TOK.strings[:, :1]).all(1)
SAME = Table(probabilities=tuple(0.99 * EQUAL / 3 + 0.01 / 81))


def recipe(table, num_steps, **fields):
    solver = {"name": "lsd"} | fields
    return Recipe(
        model=registry.models.describe(table),
        solver=solver,
        times={"name": "uniform", "num_steps": num_steps},
        guidance={"name": "none"},
        strategy={"name": "single"},
    ).completed()


def learned(table, num_steps, **fields):
    """Times and coefficients."""
    (found,) = calibration.make_all(recipe(table, num_steps, **fields)).values()
    return found["times"], found["coefficients"]


def leaping_law(model, times, coefficients):
    """The exact law of tau-leaping with coefficients."""
    steps = zip(times[:-1], times[1:], coefficients, strict=True)
    return law(model, [kernel(model, 1.0 if s == 0 else -math.expm1(-c * (t - s) / t)) for t, s, c in steps])


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_coefficient_makes_up_for_the_growing_rate(num_steps):
    times, coefficients = learned(TOK, num_steps, learn="coefficients")
    assert times.tolist() == list(uniform(num_steps))
    # The rate is 1/t, and its integral over a step is known; predictions are martingales, so they cancel on average.
    exact = [t * math.log(t / s) / (t - s) for t, s in zip(times[:-2], times[1:-1], strict=True)]
    np.testing.assert_allclose(coefficients[:-1], exact, rtol=0.05)
    assert coefficients[-1] == 1


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_coefficients_improve_few_steps_of_the_base_sampler_at_equal_cost(num_steps):
    model = Lookup(TOK)
    base = distance(leaping_law(model, uniform(num_steps), [1.0] * num_steps), TOK.joint)
    found = distance(leaping_law(model, *learned(TOK, num_steps, learn="coefficients")), TOK.joint)
    floor = distance(ancestral_law(model, num_steps), TOK.joint)
    assert floor - 0.002 < found < base - 0.007


@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_learned_times_improve_it_further_where_early_tokens_matter_more(num_steps):
    model = Lookup(SAME)
    base = distance(leaping_law(model, uniform(num_steps), [1.0] * num_steps), SAME.joint)
    times, coefficients = learned(SAME, num_steps)
    found = distance(leaping_law(model, times, coefficients), SAME.joint)
    assert found < 0.93 * distance(ancestral_law(model, num_steps), SAME.joint)
    assert found < 0.97 * base
    assert times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    assert 1 - times[1] < 1 / num_steps, "the first step is shorter than a uniform one"


def test_rows_are_those_of_the_learned_law():
    rows = 3000
    made = recipe(SAME, 2)
    made.check()
    exact = leaping_law(Lookup(SAME), *learned(SAME, 2))
    found = generate(made, 0, rows)
    assert (found["nfe"] == 2).all()
    error = 0.5 * np.sqrt(exact * (1 - exact) / rows).sum() + math.sqrt(15 / (2 * rows))
    assert distance(shares(torch.from_numpy(found["x0"]), SAME), exact) < error


def test_learning_nothing_is_tau_leaping_draw_for_draw():
    a, b = (sampler_of(s, 5).run(noise_of(300)).x for s in ({"name": "lsd", "learn": "nothing"}, "tau_leaping"))
    assert torch.equal(a, b)
    assert recipe(TOK, 4, learn="nothing").calibrations == ()


def test_the_artifact_depends_on_the_number_of_steps_and_on_filters():
    keys = {recipe(TOK, n, filters=f).calibrations[0].key for n in (2, 3) for f in ([], [{"name": "top_p"}])}
    assert len(keys) == 4


REFUSED = [
    ({"learn": "times"}, "unknown learn 'times'"),
    ({"num_fine": 1}, "lsd needs num_fine >= 2"),
    ({"num_fine": 3}, "distils 3 steps of its teacher into fewer, but the grid has 4"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_what_cannot_be_distilled_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(TOK, 4, **fields).check()
