"""Guidance on an interval of noise levels: what is guided, and what that costs."""

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.coefficients import rho
from tasks.recipe import Recipe
from tasks.run import generate

GRID = {"name": "logsnr", "num_steps": 6}


def recipe(solver="ddim", model="digits", **guidance):
    guided = {"name": "cfg", "scale": 2.0} | guidance
    stock = isinstance(solver, dict) and solver["name"] == "diffusers"
    times = {"name": "stock", "num_steps": 6} if stock else GRID
    return Recipe(model, solver, times, guided, "single", batch_size=8).completed()


SOLVERS = [
    "ddim", "heun", "dpmpp_2m", "ghvb",
    {"name": "unified", "preset": "dpm_solver_3"}, {"name": "unified", "preset": "dpmpp_2s"},
    {"name": "unified", "preset": "unipc", "implicit_start": 2}, {"name": "unified", "preset": "heun", "churn": 0.2},
    {"name": "unified", "corrector": "implicit"}, {"name": "unified", "first": "noise"}, 
    {"name": "diffusers", "scheduler": "DDIMScheduler"}, "predictor_corrector",
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("interval", [(0.3, 2.0), (None, 1.0), (0.5, None)], ids=str)
def test_rows_cost_exactly_what_was_planned(solver, interval):
    made = recipe(solver, sigma_low=interval[0], sigma_high=interval[1])
    made.check()
    rows = generate(made, 0, 2)
    full = recipe(solver).nfe
    assert (rows["nfe"] == made.nfe).all() and full // 2 <= made.nfe < full


def test_the_cost_is_two_evaluations_inside_and_one_outside():
    made = recipe(sigma_low=0.3, sigma_high=2.0)
    levels = [rho(made.parts.model.noising, t) for t in made.grid[0][:-1]]
    assert made.nfe == 6 + sum(0.3 < level <= 2.0 for level in levels)


def test_an_interval_that_covers_everything_is_plain_guidance_and_one_that_covers_nothing_is_none():
    plain, everything = recipe(), recipe(sigma_low=0.0)
    assert everything.nfe == plain.nfe == 12
    np.testing.assert_array_equal(generate(everything, 0, 4)["x0"], generate(plain, 0, 4)["x0"])
    nothing, conditional = recipe(sigma_low=1e9, sigma_high=2e9), recipe().override({"guidance": "none"})
    # The first time of a VP process has a finite level far below; no step lies in the interval.
    assert nothing.nfe == conditional.nfe == 6
    np.testing.assert_array_equal(generate(nothing, 0, 4)["x0"], generate(conditional, 0, 4)["x0"])


def test_rows_with_times_of_their_own_are_guided_each_for_itself():
    model = registry.models.build({"name": "digits"}).load("cpu")
    guided = registry.guidance.build({"name": "cfg", "sigma_low": 0.3, "sigma_high": 2.0}).wrap(model)
    x, cond = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
    t = torch.tensor([0.9, 0.3, 0.02], dtype=torch.float64)
    together = guided.denoise(x, t, cond)
    alone = torch.cat([guided.denoise(x[i : i + 1], float(t[i]), cond[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_fields_left_at_null_enter_no_key_and_values_do():
    made = recipe()
    bare = dict(made.guidance)
    assert registry.identity(bare) == {"name": "cfg", "scale": 2.0}
    assert recipe(sigma_low=0.3).key != made.key != recipe(sigma_high=0.3).key


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma_low": -0.1}, "sigma_low is a noise level sigma / alpha of at least 0, got -0.1"),
        ({"sigma_high": -1.0}, "sigma_high is a noise level"),
        ({"sigma_low": 2.0, "sigma_high": 2.0}, "sigma_low must be below guidance.sigma_high, got 2.0 and 2.0"),
    ],
)
def test_an_interval_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        recipe(**fields)


def test_a_cost_that_cannot_be_planned_is_refused():
    made = recipe(sigma_low=0.3)
    with pytest.raises(ValueError, match="times gits are not known before their calibration"):
        made.override({"times": "gits"}).check()
    with pytest.raises(ValueError, match="solver dpm_solver_v3 needs a calibration first"):
        made.override({"solver": "dpm_solver_v3"}).check()


def test_export_refuses_an_interval():
    from orchestrator.export.point import point

    with pytest.raises(ValueError, match="a stock loop guides at every step"):
        point(recipe(sigma_low=0.3))
