"""Strategies that draw or search for whole samples: exact laws, costs, and the trivial case."""

import math

import numpy as np
import pytest
import torch

from tasks import registry, run
from tasks.apart import residuals
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.reservation import gain, reservation
from tasks.run import generate

NORMAL = {"name": "gmm", "means": [[0.0]], "covariances": [[1.0]], "process": "flow"}
PLANE = {"name": "gmm", "dim": 3, "num_components": 3, "seed": 1, "process": "flow"}
LABELLED = {"name": "gmm", "dim": 3, "num_components": 3, "process": "flow", "labels": True}
EXACT = {"model": NORMAL, "solver": "ctm", "times": {"name": "uniform", "num_steps": 1}, "batch_size": 4096}
MAX8 = 1.4236  # E of the largest of eight normals


def recipe(**changes):
    fields = {"model": PLANE, "solver": "euler", "guidance": "none", "strategy": "single", "reward": "linear"}
    fields |= {"times": {"name": "uniform", "num_steps": 4}, "batch_size": 64}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def evaluations(made):
    """Network evaluations of every step of one trajectory."""
    solver, steps, each = made.parts.solver, len(made.grid[0]) - 1, made.parts.guidance.evaluations
    nfe = [
        0,
        *(
            solver.nfe(i) if i == steps else getattr(solver, "nfe_before_data", solver.nfe)(i)
            for i in range(1, steps + 1)
        ),
    ]
    return [each * (b - a) for a, b in zip(nfe, nfe[1:], strict=False)]


SDE = {"name": "ddim", "eta": 1.0}
TRIVIAL = {
    "best_of_n": {"n": 1},
    "pruned_best_of_n": {"n": 1},
    "adaptive_best_of_n": {"max_n": 1},
    "best_of_majority": {"n": 1, "equivalence": "cell"},
    "noise_search": {"rounds": 0},
    "path_search": {"width": 1, "children": 0},
    "beam": {"width": 1, "children": 1},
    "rollover": {"max_nfe": 4, "chains": 1, "first": 1},
    "tree": {"depth": 0},
    "tree_search": {"max_nfe": 4},
    "noise_gradient": {"iterations": 0},
    "repulsion": {"particles": 1},
}


@pytest.mark.parametrize("name", TRIVIAL)
def test_one_of_anything_is_single_draw_for_draw(name):
    single = generate(recipe(solver=SDE), 3, 20)
    rows = generate(recipe(solver=SDE, strategy={"name": name} | TRIVIAL[name]), 3, 20)
    if name == "tree_search":  # its times are a row's own, which rounds differently
        np.testing.assert_allclose(rows["x0"], single["x0"], atol=1e-5)
    else:
        np.testing.assert_array_equal(rows["x0"], single["x0"])
    assert (rows["nfe"] == single["nfe"]).all()


SPENDING = [
    {"name": "single"},
    {"name": "best_of_n", "n": 3},
    {"name": "pruned_best_of_n", "n": 6, "checks": [0.25, 0.5], "factor": 2.0},
    {"name": "pruned_best_of_n", "n": 5, "checks": [0.1, 0.99], "factor": 3.0},
    {"name": "best_of_majority", "n": 3, "equivalence": "cell"},
    {"name": "noise_search", "method": "random", "rounds": 3, "growth": 2.0, "candidates": 1},
    {"name": "noise_search", "method": "sphere", "rounds": 2, "candidates": 3},
    {"name": "noise_search", "method": "vp", "rounds": 2, "candidates": 3, "budget": {"nfe": 20}},
    {"name": "path_search", "width": 2, "children": 2, "back_steps": 3},
    {"name": "path_search", "width": 2, "children": 0},
    {"name": "beam", "width": 2, "children": 3},
    {"name": "beam", "width": 2, "children": 3, "lookahead_steps": 2, "per_parent": 1},
    {"name": "beam", "widths": [3, 2], "branching": [4, 1]},
    {"name": "beam", "width": 3, "children": 1},
    {"name": "rollover", "max_nfe": 23, "chains": 2, "first": 2},
    {"name": "rollover", "max_nfe": 30, "chains": 2, "first": 2, "budget": {"reward_calls": 21}},
    {"name": "tree", "prefix": 1, "depth": 2, "branching": 2},
    {"name": "noise_gradient", "iterations": 2},
    {"name": "noise_gradient", "iterations": 2, "checkpointing": False},
    {"name": "repulsion", "particles": 3},
    {"name": "repulsion", "particles": 3, "pick": 2},
]


@pytest.mark.parametrize("guidance", ["none", "cfg"])
@pytest.mark.parametrize("strategy", SPENDING, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_what_is_spent_is_what_was_planned(strategy, guidance):
    made = recipe(model=LABELLED, solver=SDE, strategy=strategy, guidance=guidance)
    planned = made.parts.strategy.account(evaluations(made))
    rows = generate(made, 0, 3)
    assert planned.exact
    assert (rows["nfe"] == planned.nfe).all()
    assert (rows["reward_calls"] == planned.reward_calls).all()
    assert (rows["decodes"] == planned.decodes).all()


@pytest.mark.parametrize(
    "strategy", [{"name": "adaptive_best_of_n", "max_n": 5}, {"name": "tree_search", "max_nfe": 30}]
)
@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_what_an_adaptive_strategy_spends_is_at_most_what_was_planned(strategy, guidance):
    made = recipe(model=LABELLED, solver=SDE, strategy=strategy, guidance=guidance)
    planned = made.parts.strategy.account(evaluations(made))
    rows = generate(made, 0, 40)
    assert not planned.exact
    assert (rows["nfe"] <= planned.nfe).all()
    assert (rows["reward_calls"] <= planned.reward_calls).all()
    assert (rows["reward_calls"] >= 1).all()


@pytest.mark.parametrize(
    "strategy",
    [*SPENDING, {"name": "adaptive_best_of_n"}, {"name": "tree_search", "max_nfe": 20}],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_a_row_does_not_depend_on_its_neighbours(strategy):
    made = recipe(solver=SDE, strategy=strategy, batch_size=24)
    whole = generate(made, 0, 11)
    for index in (2, 9):
        alone = generate(made, index, index + 1, isolated=True)
        for name in whole.keys() - {"seconds"}:
            np.testing.assert_allclose(alone[name], whole[name][index : index + 1], rtol=1e-5, atol=1e-6, err_msg=name)


# --- best of n -------------------------------------------------------------------------------------------------------


def test_best_of_eight_is_the_largest_of_eight_normals():
    values = generate(recipe(**EXACT, strategy={"name": "best_of_n", "n": 8}), 0, 4000)["x0"][:, 0]
    assert abs(values.mean() - MAX8) < 5 * values.std() / math.sqrt(len(values))


def test_best_of_n_is_log_n_less_n_minus_one_over_n_nats_away():
    # Of the largest of N uniforms, u = F(x) has density N u^(N-1): the divergence is E log(N u^(N-1)) under it.
    x = torch.from_numpy(generate(recipe(**EXACT, strategy={"name": "best_of_n", "n": 4}), 0, 4000)["x0"][:, 0])
    density = np.log(4 * torch.special.ndtr(x.double()).numpy() ** 3)
    assert abs(density.mean() - (math.log(4) - 3 / 4)) < 5 * density.std() / math.sqrt(len(x))


def test_pruning_without_checks_is_best_of_n():
    best = generate(recipe(solver=SDE, strategy={"name": "best_of_n", "n": 6}), 0, 12)
    pruned = generate(recipe(solver=SDE, strategy={"name": "pruned_best_of_n", "n": 6, "checks": []}), 0, 12)
    for name in ("x0", "candidate_rewards", "slot"):
        np.testing.assert_array_equal(pruned[name], best[name])


def test_candidates_that_are_not_pruned_are_those_of_best_of_n():
    best = generate(recipe(solver=SDE, strategy={"name": "best_of_n", "n": 6}), 0, 12)
    pruned = generate(recipe(solver=SDE, strategy={"name": "pruned_best_of_n", "n": 6}), 0, 12)
    assert pruned["candidate_rewards"].shape[1] == 2
    for mine, all_rewards, slot in zip(
        pruned["candidate_rewards"], best["candidate_rewards"], pruned["slot"], strict=True
    ):
        assert np.isin(mine, all_rewards).all()
        assert mine.max() == all_rewards[slot]


def test_pruning_loses_less_than_drawing_fewer():
    fields = {"batch_size": 4096, "times": {"name": "uniform", "num_steps": 10}, "solver": "euler"}
    pruned = recipe(strategy={"name": "pruned_best_of_n", "n": 8, "checks": [0.3, 0.6]}, **fields)
    cost = pruned.parts.strategy.account([1] * 10).nfe
    assert cost == 8 * 3 + 4 * 3 + 2 * 4
    n = -(-cost // 10)  # rounded in favour of best of n
    a = generate(pruned, 0, 2000)["x0"].sum(1)
    b = generate(recipe(strategy={"name": "best_of_n", "n": n}, **fields), 0, 2000)["x0"].sum(1)
    assert (a - b).mean() > 5 * (a - b).std() / math.sqrt(len(a))


# --- reservation values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "net"), [(0.1, 0.902), (0.02, 1.661), (0.005, 2.195)])
def test_the_reservation_value_of_a_normal(cost, net):
    found = reservation(0.0, 1.0, cost)
    assert abs(found - net) < 5e-3
    assert abs(gain(found) - cost) < 1e-9
    assert abs(reservation(3.0, 2.0, 2 * cost) - (3 + 2 * found)) < 1e-9


@pytest.mark.parametrize(("cost", "net", "fixed"), [(0.1, 0.902, 0.671), (0.02, 1.661, 1.470)])
def test_stopping_at_the_reservation_value_is_worth_it(cost, net, fixed):
    strategy = {"name": "adaptive_best_of_n", "cost": cost, "max_n": 1000, "prior_weight": 1e9}
    rows = generate(recipe(**EXACT, strategy=strategy), 0, 2000)
    value = rows["x0"][:, 0] - cost * rows["reward_calls"]
    error = value.std() / math.sqrt(len(value))
    assert abs(value.mean() - net) < 5 * error
    assert value.mean() > fixed + 5 * error
    assert len(np.unique(rows["reward_calls"])) > 5


def test_adaptive_candidates_are_those_of_best_of_n():
    best = generate(recipe(strategy={"name": "best_of_n", "n": 6}), 0, 16)
    rows = generate(recipe(strategy={"name": "adaptive_best_of_n", "max_n": 6, "cost": 0.05}), 0, 16)
    drawn = rows["reward_calls"]
    assert len(set(drawn)) > 1
    for i, count in enumerate(drawn):
        np.testing.assert_allclose(
            rows["candidate_rewards"][i, :count], best["candidate_rewards"][i, :count], rtol=1e-6
        )
        assert np.isnan(rows["candidate_rewards"][i, count:]).all()
        assert rows["slot"][i] == best["candidate_rewards"][i, :count].argmax()
    assert (rows["nfe"] == 4 * drawn).all()


def test_a_budget_caps_an_adaptive_strategy():
    strategy = {"name": "adaptive_best_of_n", "max_n": 50, "cost": 1e-6, "budget": {"nfe": 13}}
    assert (generate(recipe(strategy=strategy), 0, 9)["nfe"] == 12).all()


# --- majority --------------------------------------------------------------------------------------------------------


def test_no_threshold_is_best_of_n():
    best = generate(recipe(strategy={"name": "best_of_n", "n": 6}), 0, 12)
    rows = generate(
        recipe(strategy={"name": "best_of_majority", "n": 6, "threshold": 0.0, "equivalence": "cell"}), 0, 12
    )
    np.testing.assert_array_equal(rows["x0"], best["x0"])


def test_a_rare_class_does_not_win_however_good():
    # Two modes far apart: a twentieth of the samples has the large reward.
    rare = NORMAL | {"means": [[-3.0], [3.0]], "covariances": [[0.01], [0.01]], "weights": [0.95, 0.05]}
    fields = {"model": rare, "times": {"name": "uniform", "num_steps": 20}, "batch_size": 2048}
    majority = {"name": "best_of_majority", "n": 16, "threshold": 0.5, "equivalence": "cell", "cell": 6.0}
    mine = generate(recipe(**fields, strategy=majority), 0, 128)
    best = generate(recipe(**fields, strategy={"name": "best_of_n", "n": 16}), 0, 128)
    assert (mine["x0"] < 0).mean() > 0.98
    assert (best["x0"] > 0).mean() > 0.4
    assert (mine["frequency"] >= 0.5).all()


def test_frequencies_count_the_digits_that_the_classifier_sees():
    strategy = {"name": "best_of_majority", "n": 5, "threshold": 0.4, "equivalence": "classifier"}
    rows = generate(
        recipe(model="digits", strategy=strategy, reward="ink", times={"name": "uniform", "num_steps": 3}), 0, 6
    )
    assert (rows["candidate_frequencies"] * 5 % 1 < 1e-6).all()
    assert (rows["frequency"] >= np.minimum(0.4, rows["candidate_frequencies"].max(1)) - 1e-9).all()


# --- noise search ----------------------------------------------------------------------------------------------------


def test_random_noise_search_is_best_of_n():
    for solver in ("euler", SDE):
        best = generate(recipe(solver=solver, strategy={"name": "best_of_n", "n": 7}), 0, 9)
        search = {"name": "noise_search", "method": "random", "rounds": 2, "candidates": 2, "growth": 2.0}
        rows = generate(recipe(solver=solver, strategy=search), 0, 9)
        for name in ("candidate_rewards", "slot", "x0"):
            np.testing.assert_allclose(rows[name], best[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 16, 192])
def test_neighbours_on_the_sphere_keep_length_and_angle(dim):
    streams = RowNoise(0, torch.arange(50), dtype=torch.float64)
    pivot = streams.normal((dim,), "pivot")
    near = registry.strategies.build({"name": "noise_search", "cosine": 0.9}).neighbours(pivot, streams)
    np.testing.assert_allclose(near.norm(dim=1), pivot.norm(dim=1), rtol=1e-6)
    cosine = (near * pivot).sum(1) / pivot.norm(dim=1) ** 2
    np.testing.assert_allclose(cosine, 0.9, atol=1e-6)


def test_vp_neighbours_of_normal_noise_are_normal():
    streams = RowNoise(0, torch.arange(20000), dtype=torch.float64)
    pivot = streams.normal((2,), "pivot")
    near = registry.strategies.build({"name": "noise_search", "method": "vp", "spread": 0.7}).neighbours(pivot, streams)
    count = near.numel()
    assert abs(near.mean()) < 5 / math.sqrt(count)
    assert abs(near.square().mean() - 1) < 5 * math.sqrt(2 / count)
    correlation = (near * pivot).mean().item()
    assert abs(correlation - 1 / math.sqrt(1.49)) < 5 * 1.5 / math.sqrt(count)


@pytest.mark.parametrize("method", ["random", "sphere", "vp"])
def test_the_search_curve_never_falls_and_ends_at_the_returned_sample(method):
    strategy = {"name": "noise_search", "method": method, "rounds": 5, "candidates": 2}
    rows = generate(recipe(strategy=strategy, reward="quadratic"), 0, 40)
    assert (np.diff(rows["search_curve"], axis=1) >= 0).all()
    returned = -((rows["x0"].astype(np.float64) - 1.5) ** 2).sum(1) / 2
    np.testing.assert_allclose(rows["search_curve"][:, -1], returned, rtol=1e-5)
    np.testing.assert_allclose(rows["candidate_rewards"].max(1), returned, rtol=1e-5)
    picked = rows["candidate_rewards"][np.arange(40), rows["slot"]]
    np.testing.assert_allclose(picked, returned, rtol=1e-5)


def test_more_rounds_only_add_to_fewer():
    few, many = (
        generate(recipe(strategy={"name": "noise_search", "rounds": rounds}, batch_size=80), 0, 20)["search_curve"]
        for rounds in (2, 5)
    )
    np.testing.assert_array_equal(many[:, :3], few)


def test_a_local_search_beats_random_search_where_the_reward_is_smooth():
    wide = {"name": "gmm", "dim": 16, "num_components": 4, "seed": 0, "process": "flow"}
    means = []
    for method in ("random", "vp"):
        strategy = {"name": "noise_search", "method": method, "rounds": 40, "candidates": 4, "restart": False}
        made = recipe(
            model=wide,
            strategy=strategy,
            reward="quadratic",
            batch_size=1024,
            times={"name": "uniform", "num_steps": 6},
        )
        means.append(generate(made, 0, 256)["search_curve"][:, -1])
    gain = means[1] - means[0]
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


# --- path search -----------------------------------------------------------------------------------------------------


def test_path_search_without_children_is_best_of_n():
    best = generate(recipe(solver=SDE, strategy={"name": "best_of_n", "n": 3}), 0, 9)
    rows = generate(recipe(solver=SDE, strategy={"name": "path_search", "width": 3, "children": 0}), 0, 9)
    np.testing.assert_array_equal(rows["x0"], best["x0"])


def test_path_search_ends_at_the_data_in_as_many_rounds_as_progress_needs():
    search = registry.strategies.build("path_search")
    rounds = search.intervals
    assert len(rounds) == 4
    assert rounds[0] == pytest.approx((0.89, 0.08))
    assert rounds[-1][1] == 0.0
    assert [up - down for up, down in rounds[:-1]] == pytest.approx([0.81] * 3)


def test_path_search_keeps_the_law_without_a_choice_and_raises_the_reward_with_one():
    fields = {"model": NORMAL | {"means": [[-2.0], [2.0]], "covariances": [[0.25], [0.25]]}, "batch_size": 4096}
    fields |= {"times": {"name": "uniform", "num_steps": 16}}
    free = generate(
        recipe(**fields, strategy={"name": "path_search", "width": 1, "children": 1, "back_steps": 16}), 0, 4000
    )
    x = free["x0"][:, 0]
    assert abs(x.mean()) < 5 * 2.06 / math.sqrt(len(x))
    assert abs(x.var() - 4.25) < 0.25  # Euler in 16 steps narrows the modes a little
    found = generate(
        recipe(**fields, strategy={"name": "path_search", "width": 2, "children": 4, "back_steps": 16}), 0, 300
    )
    best = generate(recipe(**fields, strategy={"name": "best_of_n", "n": 2}), 0, 300)
    gain = found["x0"][:, 0] - best["x0"][:, 0]
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


# --- gradients -------------------------------------------------------------------------------------------------------


def test_the_noise_gradient_is_that_of_the_whole_trajectory():
    made = recipe(
        solver=SDE,
        dtype="float64",
        strategy={"name": "noise_gradient", "iterations": 1, "rate": 1.0, "clip": 1e9, "shell": 0.3},
    )
    strategy, model = made.parts.strategy, run.load_model(made)
    sampler = run.Sampler(model, made.parts.solver, made.grid[0], None, None, None)
    noise = RowNoise(0, torch.arange(3), dtype=torch.float64)

    def objective(n):
        x0 = strategy._sample(sampler, n, noise)
        length = n.norm(dim=1)
        return x0.sum(1), x0.sum(1) + 0.3 * (2 * torch.log(length) - 0.5 * length**2)

    start = noise.at(-1).normal((3,), "prior").requires_grad_()
    value, _ = objective(start)
    gradient = strategy._gradient(start, value)
    for k in range(3):
        h = torch.zeros(3, dtype=torch.float64)
        h[k] = 1e-5
        with torch.no_grad():
            slope = (objective(start + h)[1] - objective(start - h)[1]) / 2e-5
        np.testing.assert_allclose(gradient[:, k], slope, rtol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", SDE])
def test_checkpointing_changes_nothing_but_the_cost(solver):
    pair = [
        generate(recipe(solver=solver, strategy={"name": "noise_gradient", "iterations": 3, "checkpointing": on}), 0, 6)
        for on in (True, False)
    ]
    np.testing.assert_allclose(pair[0]["x0"], pair[1]["x0"], rtol=1e-6)
    assert (pair[0]["nfe"] == 4 * 7).all()
    assert (pair[1]["nfe"] == 4 * 4).all()


def test_climbing_raises_the_reward_and_stays_on_the_shell():
    wide = {"name": "gmm", "dim": 16, "num_components": 4, "process": "flow"}
    climb = {"name": "noise_gradient", "iterations": 8, "rate": 1.0, "shell": 0.1}
    rows = generate(recipe(model=wide, strategy=climb, reward="quadratic"), 0, 32)
    gains = rows["candidate_rewards"].max(1) - rows["candidate_rewards"][:, 0]
    assert (gains > 0).all()
    free = generate(recipe(model=wide, strategy=climb | {"shell": 0.0}, reward="quadratic"), 0, 32)
    shell = math.sqrt(15)
    assert np.abs(rows["noise_length"] - shell).mean() < np.abs(free["noise_length"] - shell).mean()
    assert np.abs(rows["noise_length"] - shell).mean() < 1.5


def test_gradients_pass_through_the_digits_network_and_classifier():
    strategy = {"name": "noise_gradient", "iterations": 3, "rate": 2.0}
    made = recipe(
        model="digits",
        solver="ddim",
        strategy=strategy,
        reward="class_log_prob",
        batch_size=4,
        times={"name": "uniform", "num_steps": 1},
    )
    rows = generate(made, 0, 4)
    assert (rows["candidate_rewards"].max(1) > rows["candidate_rewards"][:, 0] + 1e-3).any()


def test_gradients_pass_through_one_step_models():
    strategy = {"name": "noise_gradient", "iterations": 4, "rate": 2.0}
    fields = {"model": "digits_consistency", "solver": "consistency", "times": {"name": "uniform", "num_steps": 1}}
    rows = generate(recipe(**fields, strategy=strategy, reward="symmetry", batch_size=8), 0, 8)
    assert (rows["candidate_rewards"].max(1) > rows["candidate_rewards"][:, 0]).all()


# --- repulsion -------------------------------------------------------------------------------------------------------


def test_the_first_particle_is_single_and_the_others_are_not_independent():
    single = generate(recipe(solver=SDE), 0, 8)["x0"]
    np.testing.assert_array_equal(
        generate(recipe(solver=SDE, strategy={"name": "repulsion", "pick": 0}), 0, 8)["x0"], single
    )
    free, pushed = (
        generate(recipe(solver=SDE, strategy={"name": "repulsion", "pick": 2, "alpha": alpha}), 0, 8)["x0"]
        for alpha in (0.0, 0.5)
    )
    assert not np.isclose(free, pushed).all()


def test_no_repulsion_is_best_of_n():
    best = generate(recipe(strategy={"name": "best_of_n", "n": 4}), 0, 8)
    rows = generate(recipe(strategy={"name": "repulsion", "alpha": 0.0}), 0, 8)
    np.testing.assert_array_equal(rows["x0"], best["x0"])


@pytest.mark.parametrize("features", ["identity", "classifier"])
def test_repulsion_spreads_the_particles(features):
    fields = {"model": "digits", "reward": "ink", "batch_size": 64, "times": {"name": "uniform", "num_steps": 4}}
    apart = [
        generate(recipe(**fields, strategy={"name": "repulsion", "alpha": alpha, "features": features}), 0, 16)[
            "spread"
        ]
        for alpha in (0.0, 0.3)
    ]
    gain = apart[1] - apart[0]
    assert gain.mean() > 4 * gain.std() / 4


def test_residuals_are_orthogonal_to_all_before():
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4, 7)))
    outward = residuals(features)
    assert (outward[:, 0] == 0).all()
    for k in range(1, 4):
        assert (outward[:, k : k + 1] @ features[:, :k].transpose(1, 2)).abs().max() < 1e-12
        np.testing.assert_allclose(outward[:, k].norm(dim=1), 1.0)
    repeated = torch.cat([features[:, :1], features[:, :1]], 1)
    assert (residuals(repeated)[:, 1] == 0).all()  # nothing to push along


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "best_of_majority"}, "strategy.equivalence=None is none for model gmm. Set it to classifier"),
        ({"strategy": {"name": "best_of_majority", "equivalence": "classifier"}}, r"reads 8x8 grey images"),
        ({"strategy": "noise_search", "model": NORMAL}, "sphere needs two dimensions"),
        (
            {"strategy": "noise_search", "model": "table", "solver": "ancestral"},
            "searches over Gaussian starting noise",
        ),
        ({"strategy": "path_search", "solver": "heun"}, "one evaluation a step, but solver is heun"),
        ({"strategy": "beam", "solver": {"name": "dpmpp_2m"}}, "beam copies particles, but dpmpp_2m is deterministic"),
        ({"strategy": "rollover", "model": "gmm"}, "needs a flow model, but model gmm has process VP"),
        ({"strategy": {"name": "rollover", "max_nfe": 12}}, "max_nfe=12 cannot take 2 chains of 4 steps"),
        ({"strategy": {"name": "tree", "prefix": 2, "depth": 2}, "solver": SDE}, "only the first 3 can"),
        ({"strategy": "tree", "solver": "dpmpp_2m"}, "dpmpp_2m has none. Use solver=ddim"),
        ({"strategy": {"name": "tree_search", "max_nfe": 3}, "solver": SDE}, "less than one rollout of 4 steps"),
        ({"strategy": "tree_search", "solver": "flow_sde"}, "flow_sde keeps a memory"),
        ({"strategy": "noise_gradient", "reward": "class_correct", "model": "digits"}, "class_correct is none"),
        ({"strategy": "repulsion", "model": "table", "solver": "ancestral"}, "moves clean predictions in space"),
    ],
)
def test_what_cannot_work_is_refused_when_planning(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("name", ["beam", "pruned_best_of_n", "path_search", "rollover"])
def test_a_reward_that_cannot_judge_predictions_is_refused(monkeypatch, name):
    monkeypatch.setattr(registry.rewards.get("linear"), "scores_predictions", False, raising=False)
    with pytest.raises(ValueError, match=f"{name} judges unfinished samples .* reward linear cannot score these"):
        recipe(solver=SDE, strategy=name)
    recipe(solver=SDE, strategy="best_of_n")


@pytest.mark.parametrize(
    "spec",
    [
        *({"name": "fk_steering", "potential": p} for p in ("difference", "max", "sum", "immediate")),
        {"name": "svdd"}, {"name": "das"}, {"name": "fkc", "strength": 1.0}, {"name": "afdps"},
    ],
    ids=lambda spec: "-".join(str(value) for value in spec.values()),
)  # fmt: skip
def test_a_potential_of_predictions_refuses_a_reward_that_cannot_judge_them(monkeypatch, spec):
    monkeypatch.setattr(registry.rewards.get("linear"), "scores_predictions", False, raising=False)
    with pytest.raises(
        ValueError, match=f"{spec['name']} judges unfinished samples .* reward linear cannot score these"
    ):
        recipe(solver=SDE, strategy=spec)
    recipe(solver=SDE, strategy={"name": "svdd", "value": "monte_carlo"})  # judges whole samples


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "pruned_best_of_n", "checks": [0.6, 0.3]}, "checks must increase within"),
        ({"name": "pruned_best_of_n", "factor": 0.5}, "factor >= 1"),
        ({"name": "adaptive_best_of_n", "cost": 0.0}, "cost, std and prior_weight above 0"),
        ({"name": "adaptive_best_of_n", "min_n": 5, "max_n": 2}, "1 <= min_n <= max_n"),
        ({"name": "best_of_majority", "equivalence": "clip"}, "unknown equivalence 'clip'"),
        ({"name": "noise_search", "method": "walk"}, "unknown method 'walk'"),
        ({"name": "noise_search", "cosine": 1.0}, "cosine between -1 and 1"),
        ({"name": "path_search", "forward": 0.8, "back": 0.7}, "forward < back"),
        ({"name": "beam", "branching": [2, 0]}, "branching of at least 1"),
        ({"name": "rollover", "path": "cosine"}, "unknown path 'cosine'"),
        ({"name": "tree_search", "strength": 0.0}, "strength must be above 0, got 0"),
        ({"name": "noise_gradient", "strength": -1.0}, "strength must be above 0, got -1"),
        ({"name": "repulsion", "pick": 4}, "pick must be between 0 and 3"),
    ],
)
def test_impossible_settings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.strategies.build(spec)
