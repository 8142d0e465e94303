"""Beam, prefix-sharing tree and tree search: arithmetic, choice, and laws."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate

PLANE = {"name": "gmm", "dim": 3, "num_components": 3, "seed": 1, "process": "flow"}
GM1D = {
    "name": "gmm",
    "means": [[-2.0], [0.5], [2.5]],
    "covariances": [[0.25], [0.09], [0.36]],
    "weights": [0.5, 0.3, 0.2],
}
SDE = {"name": "ddim", "eta": 1.0}


def recipe(**changes):
    fields = {"model": PLANE, "solver": SDE, "guidance": "none", "strategy": "single", "reward": "linear"}
    fields |= {"times": {"name": "uniform", "num_steps": 6}, "batch_size": 64}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def build(name, **fields):
    return registry.strategies.build({"name": name} | fields)


# --- beam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [SDE, {"name": "flow_sde"}, "dpmpp_2m", {"name": "unified"}])
def test_a_beam_without_children_is_best_of_n(solver):
    best = generate(recipe(solver=solver, strategy={"name": "best_of_n", "n": 3}), 0, 9)
    beam = generate(recipe(solver=solver, strategy={"name": "beam", "width": 3, "children": 1}), 0, 9)
    for name in ("x0", "candidate_rewards", "slot", "nfe"):
        np.testing.assert_array_equal(beam[name], best[name])


def test_a_beam_on_tokens_without_children_is_best_of_n():
    fields = {"model": "table", "solver": "ancestral", "reward": "ink"}
    best = generate(recipe(**fields, strategy={"name": "best_of_n", "n": 3}), 0, 9)
    beam = generate(recipe(**fields, strategy={"name": "beam", "width": 3, "children": 1}), 0, 9)
    np.testing.assert_array_equal(beam["x0"], best["x0"])
    better = generate(recipe(**fields, strategy={"name": "beam", "width": 3, "children": 3}, batch_size=900), 0, 100)
    best = generate(recipe(**fields, strategy={"name": "best_of_n", "n": 3}, batch_size=300), 0, 100)
    assert better["x0"].mean() > best["x0"].mean()


def test_a_beam_costs_b_and_b_w_a_step():
    planned = build("beam", width=2, children=5).account([1] * 10)
    assert (planned.nfe, planned.reward_calls) == (2 + 2 * 5 * 9, 2 * 5 * 9 + 2)
    assert build("beam", width=2, children=5, lookahead_steps=3).account([1] * 10).nfe == 2 + 3 * 2 * 5 * 9


def test_schedules_of_width_and_children_apply_to_their_stretches():
    beam = build("beam", widths=[4, 2], branching=[3, 1, 1])
    assert beam._plan(6) == [(4, 3), (4, 3), (4, 1), (2, 1), (2, 1), (2, 1)]
    assert build("beam", widths=[1, 9], branching=[2])._plan(4) == [
        (1, 2),
        (1, 2),
        (2, 2),
        (4, 2),
    ]  # no more than exist


def test_a_parent_keeps_no_more_children_than_its_cap():
    rewards = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0]])
    free, capped = (build("beam", width=2, children=3, per_parent=cap)._keep(rewards, 3, 3) for cap in (0, 2))
    assert free.tolist() == [[0, 1, 2]]
    assert capped.tolist() == [[0, 1, 5]]


def test_a_wider_beam_finds_better_samples_than_best_of_n_at_its_cost():
    fields = {"model": PLANE | {"dim": 16}, "reward": "quadratic", "batch_size": 2048}
    fields |= {"times": {"name": "uniform", "num_steps": 10}}
    beam = recipe(**fields, strategy={"name": "beam", "width": 2, "children": 5})
    n = -(-beam.parts.strategy.account([1] * 10).nfe // 10)
    a = generate(beam, 0, 400)["candidate_rewards"].max(1)
    b = generate(recipe(**fields, strategy={"name": "best_of_n", "n": n}), 0, 400)["candidate_rewards"].max(1)
    assert (a - b).mean() > 5 * (a - b).std() / math.sqrt(len(a))


# --- prefix-sharing tree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "nfe"), [(0, 351), (10, 201)])
def test_a_tree_shares_its_prefix(prefix, nfe):
    planned = build("tree", prefix=prefix, depth=4, branching=2).account([1] * 25)
    assert (planned.nfe, planned.reward_calls) == (nfe, 16)


def test_leaves_share_what_they_should():
    made = recipe(strategy={"name": "tree", "prefix": 1, "depth": 2, "branching": 3})
    rewards = generate(made, 0, 5)["candidate_rewards"]
    assert rewards.shape == (5, 9)
    assert all(len(np.unique(row)) == 9 for row in rewards)
    # One node's children are closer to each other than to the children of others.
    families = rewards.reshape(5, 3, 3)
    assert families.var(axis=2).mean() < families.mean(axis=2).var(axis=1).mean() * 9


def test_a_tree_of_one_branch_is_a_trajectory_of_its_solver():
    made = recipe(
        strategy={"name": "tree", "prefix": 0, "depth": 1, "branching": 1}, times={"name": "uniform", "num_steps": 2}
    )
    np.testing.assert_array_equal(
        generate(made, 0, 6)["x0"], generate(recipe(times={"name": "uniform", "num_steps": 2}), 0, 6)["x0"]
    )


def test_noise_grows_with_the_level():
    # Spread of the children of one node, from the first to the last branching step, on a single Gaussian.
    fields = {"model": {"name": "gmm", "means": [[0.0]], "covariances": [[1.0]]}, "batch_size": 1024}
    spread = []
    for prefix, depth in ((2, 1), (2, 2)):
        made = recipe(**fields, strategy={"name": "tree", "prefix": prefix, "depth": depth, "branching": 2})
        rewards = generate(made, 0, 500)["candidate_rewards"].reshape(500, 2, -1)
        spread.append(rewards.mean(2).var(axis=1).mean())
    assert spread[1] < spread[0]  # half the noise at the first of two levels


def test_advantages_are_values_less_the_mean_of_the_siblings():
    tree = build("tree", depth=2, branching=2)
    found = tree.advantages(torch.tensor([[1.0, 3.0, 4.0, 8.0]]))
    assert found.tolist() == [[-2.0, 2.0, -1.0, 1.0, -2.0, 2.0]]
    rows = generate(recipe(strategy={"name": "tree", "depth": 2, "branching": 2}), 0, 4)
    assert rows["advantages"].shape == (4, 6)
    np.testing.assert_allclose(rows["advantages"].reshape(4, 3, 2).sum(2), 0.0, atol=1e-9)


# --- tree search -----------------------------------------------------------------------------------------------------

STEPS = {"name": "uniform", "num_steps": 5}


def search(count, **fields):
    strategy = {"name": "tree_search", "strength": 2.0} | fields
    made = recipe(model=GM1D, reward="quadratic", times=STEPS, strategy=strategy, batch_size=512)
    return generate(made, 0, count)


def test_a_tree_search_never_spends_more_than_its_budget_and_little_less():
    for budget in (5, 9, 23, 40):
        rows = search(32, max_nfe=budget)
        assert (rows["nfe"] <= budget).all()
        assert (rows["nfe"] > budget - 5).all()
        assert (rows["reward_calls"] <= rows["nfe"] - 4).all()


def test_the_best_leaf_of_more_rollouts_is_better():
    means = [search(128, max_nfe=budget, rule="uct")["leaf_reward"].mean() for budget in (5, 20, 60)]
    assert means[0] < means[1] - 0.1 < means[2] - 0.1
    rows = search(64, max_nfe=40, rule="uct")
    np.testing.assert_allclose(rows["leaf_reward"], -((rows["x0"][:, 0] - 1.5) ** 2) / 2, rtol=1e-4, atol=1e-6)


def test_a_soft_tree_search_approaches_the_tilted_law():
    # The law that five steps of the solver give, tilted by weights: that is what a tree over those steps can reach.
    plain = generate(recipe(model=GM1D, times=STEPS, batch_size=8192), 0, 50000)["x0"][:, 0].astype(np.float64)
    weights = np.exp(-((plain - 1.5) ** 2))
    log_z = math.log(weights.mean())
    mean = np.average(plain, weights=weights)
    variance = np.average((plain - mean) ** 2, weights=weights)
    errors = []
    for budget in (5, 20, 100):
        rows = search(400, max_nfe=budget)
        x = rows["x0"][:, 0]
        errors.append(abs(x.mean() - mean))
    assert errors[0] > 1.0
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1 + 5 * math.sqrt(variance / 400)
    assert abs(x.var() - variance) < 0.15 + 5 * variance * math.sqrt(2 / 400)
    # Visits depend on the values, so the root must not be taken for log Z.
    assert rows["root_value"].mean() < log_z - 0.3


def test_semantics_follow_the_rule():
    assert build("tree_search", rule="soft").semantics == "sample"
    assert build("tree_search", rule="uct").semantics == "best"


def test_tree_search_works_on_tokens():
    made = recipe(
        model="table",
        solver="ancestral",
        reward="ink",
        strategy={"name": "tree_search", "max_nfe": 40, "strength": 4.0},
    )
    plain = recipe(model="table", solver="ancestral", reward="ink")
    assert generate(made, 0, 128)["x0"].mean() > generate(plain, 0, 128)["x0"].mean() + 0.1
