"""What a sample is planned to cost is what it costs, and caps are kept before any work starts."""

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import _shares, generate
from tasks.sampler import CountedModel, Sampler

PLANE = {"name": "gmm", "dim": 3, "num_components": 3, "seed": 1, "process": "flow"}
SDE = {"name": "ddim", "eta": 1.0}


def recipe(**changes):
    fields = {"model": PLANE, "solver": SDE, "guidance": "none", "strategy": "single", "reward": "linear"}
    fields |= {"times": {"name": "uniform", "num_steps": 6}, "batch_size": 16}
    return Recipe(**fields | changes).completed()


def counted(made):
    """Evaluations a row of every step that is really taken."""
    p, (grid, stock) = made.parts, made.grid
    model = CountedModel(p.model.load("cpu"), 16)
    sampler = Sampler(p.guidance.wrap(model), p.solver, grid, None, stock, p.initial)
    noise = RowNoise(0, torch.arange(2), dtype=torch.float64)
    state, before, found = sampler.start(noise), 0, []
    while state.step < sampler.num_steps:
        state = sampler.step(state, noise)
        found.append((model.rows - before) // 2)
        before = model.rows
    return tuple(found)


SOLVERS = [
    {"name": "euler"},
    {"name": "heun"},
    {"name": "heun", "leading_euler_steps": 2},
    {"name": "dpmpp_2m"},
    {"name": "ghvb"},
    {"name": "predictor_corrector", "corrector_steps": 2},
    {"name": "unified", "preset": "dpmpp_2m"},
    {"name": "unified", "preset": "dpm_solver_3", "leading": 1},
    {"name": "unified", "preset": "heun"},
    {"name": "unified", "preset": "pndm"},
    {"name": "diffusers", "scheduler": "HeunDiscreteScheduler"},
    {"name": "diffusers", "scheduler": "PNDMScheduler", "config": {"skip_prk_steps": True}},
    {"name": "diffusers", "scheduler": "DPMSolverMultistepScheduler"},
]


# Stock schedulers lay their own grid, which only falls.
GRIDS = [(s, times) for s in SOLVERS for times in (["stock"] if s["name"] == "diffusers" else ["uniform", "travel"])]


@pytest.mark.parametrize(
    ("solver", "times"), GRIDS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_every_step_costs_what_is_planned_for_it(solver, times):
    vp = PLANE | {"process": "vp"}
    grid = {"name": times, "base": {"name": "uniform", "num_steps": 5}} if times == "travel" else {"name": times}
    made = recipe(model=vp, solver=solver, times=grid | ({"num_steps": 5} if times != "travel" else {}))
    made.check()
    assert made.evaluations == counted(made)
    assert sum(made.evaluations) == made.nfe


STRATEGIES = [
    {"name": "fk_steering", "particles": 3, "first": 1, "every": 2},
    {"name": "svdd", "children": 3},
    {"name": "svdd", "children": 3, "value": "monte_carlo", "rollouts": 2},
    {"name": "das", "particles": 3},
    {"name": "best_of_n", "n": 3},
    {"name": "pruned_best_of_n", "n": 4},
    {"name": "noise_search", "rounds": 2},
    {"name": "path_search"},
    {"name": "beam", "lookahead_steps": 2},
    {"name": "rollover", "max_nfe": 40},
    {"name": "tree", "prefix": 1},
    {"name": "noise_gradient", "iterations": 2},
    {"name": "repulsion"},
    {"name": "fkc", "particles": 3},
    {"name": "minority"},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_recipes_account_is_what_every_row_costs(strategy):
    made = recipe(strategy=strategy)
    made.check()
    rows, account = generate(made, 0, 2), made.account
    assert account.exact
    for name in ("nfe", "reward_calls", "decodes"):
        assert (rows[name] == getattr(account, name)).all(), name
    assert made.nfe == account.nfe


def test_a_row_that_stopped_early_is_charged_for_itself_alone():
    rows = generate(recipe(strategy={"name": "adaptive_best_of_n", "cost": 0.3}), 0, 32)
    assert len(set(rows["nfe"])) > 1
    np.testing.assert_array_equal(rows["nfe"], 6 * rows["reward_calls"])
    np.testing.assert_array_equal(rows["decodes"], rows["reward_calls"])
    for block in (slice(0, 16), slice(16, 32)):
        share = rows["seconds"][block] / rows["nfe"][block]
        np.testing.assert_allclose(share, share[0], rtol=1e-5)


def test_seconds_of_a_batch_are_shared_out_whole():
    assert _shares(3.0, 4, None).sum() == pytest.approx(3.0)
    np.testing.assert_allclose(_shares(3.0, 3, torch.tensor([1, 2, 3])), [0.5, 1.0, 1.5])
    np.testing.assert_allclose(_shares(3.0, 2, torch.tensor([0, 0])), [1.5, 1.5])


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [{"nfe": 23}, {"reward_calls": 3}, {"decodes": 3}])
def test_a_strategy_that_cannot_keep_to_a_cap_is_refused_with_the_numbers(cap):
    (key, value), spent = next(iter(cap.items())), {"nfe": 24, "reward_calls": 4, "decodes": 4}
    made = recipe(strategy={"name": "best_of_n", "n": 4, "budget": cap})
    with pytest.raises(ValueError, match=rf"may spend {spent[key]} .*nfe=24.*strategy.budget.{key}={value}"):
        made.check()
    recipe(strategy={"name": "best_of_n", "n": 4, "budget": spent}).check()


@pytest.mark.parametrize("name", registry.strategies.names())
def test_every_strategy_has_a_budget_that_means_something(name):
    made = recipe(strategy={"name": name, "budget": {"memory": 3}})
    with pytest.raises(ValueError):
        made.check()
    assert made.parts.strategy.budget == {"memory": 3}


def test_caps_that_make_no_sense_are_refused():
    for budget, message in (({"nfes": 3}, "no cap 'nfes'. Allowed: nfe"), ({"nfe": -1}, "at least 0")):
        with pytest.raises(ValueError, match=message):
            recipe(strategy={"name": "single", "budget": budget}).check()
    with pytest.raises(ValueError, match="dopri5 chooses its own steps"):
        recipe(solver="dopri5", strategy={"name": "single", "budget": {"nfe": 500}}).check()


def test_a_cap_changes_the_key_only_where_it_changes_rows():
    plain, capped = ({"name": "best_of_n", "budget": b} for b in ({}, {"nfe": 100, "seconds": 3}))
    assert recipe(strategy=plain).key == recipe(strategy=capped).key
    plain, capped = ({"name": "adaptive_best_of_n", "budget": b} for b in ({}, {"nfe": 12}))
    assert recipe(strategy=plain).key != recipe(strategy=capped).key
