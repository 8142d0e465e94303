"""Strategies on tokens against laws by enumeration, on the table whose figures were measured before."""

import math

import numpy as np
import pytest
import torch
from token_oracles import TOK, Lookup, distance, noise_of, sampler_of, sampling_error, shares

from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedReward

MODEL = Lookup()
ZEROS = (TOK.strings == 0).sum(1)


def zeros(samples, cond):
    return (samples == 0).sum(1).double()


def outcome(spec, rows, steps=4, solver="first_hitting", seed=0):
    """The strategy on exact samples: one token a step."""
    sampler = sampler_of(solver, steps, MODEL)
    strategy = registry.strategies.build(spec)
    return strategy(sampler, CountedReward(zeros, "zeros"), noise_of(rows, seed))


def recipe(**changes):
    fields = {
        "model": {"name": "table", "seed": 5, "concentration": 0.25},
        "solver": "ancestral",
        "guidance": "none",
        "strategy": "single",
        "reward": {"name": "linear"},
        "times": {"name": "uniform", "num_steps": 4},
        "batch_size": 16,
    }
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


# --- steering --------------------------------------------------------------------------------------------------------

TILTED = TOK.joint * np.exp(ZEROS)
LOG_Z = math.log(TILTED.sum())  # 1.7616
STEER = {"name": "fk_steering", "particles": 256, "strength": 1.0, "every": 1, "first": 1, "output": "all"}


@pytest.mark.parametrize("fields", [{}, {"trigger": "ess"}], ids=str)
def test_steering_with_256_particles_reaches_the_tilted_table(fields):
    rows = 250
    columns = outcome(STEER | fields, rows).columns
    strings = columns["candidates"].long().view(-1, 4)
    weights = torch.exp(columns["log_weights"]).flatten() / rows
    place = (strings * torch.tensor([27, 9, 3, 1])).sum(1)
    found = torch.zeros(81, dtype=torch.float64).index_add_(0, place, weights).numpy()
    assert distance(found, TILTED / TILTED.sum()) < 0.015
    log_z = columns["log_z"]
    assert abs(float(torch.logsumexp(log_z, 0)) - math.log(rows) - LOG_Z) < 0.015
    assert abs(LOG_Z - 1.7616) < 5e-5


def test_the_estimate_of_z_is_unbiased_for_two_particles():
    rows = 20_000
    z = torch.exp(outcome(STEER | {"particles": 2}, rows).columns["log_z"])
    assert abs(float(z.mean()) - TILTED.sum()) < 5 * float(z.std()) / math.sqrt(rows)


@pytest.mark.parametrize("lag", [True, False])
@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_the_rewards_of_random_guesses_are_stored_so_that_a_path_weighs_its_end_alone(potential, lag):
    # Guesses of a node are drawn; a potential that asked again what it had given before would not cancel it.
    fields = {"particles": 8, "potential": potential, "lag": lag, "predictions": 2, "trigger": "never"}
    columns = outcome(STEER | fields, 30, solver="ancestral").columns
    rewards = columns["candidate_rewards"].double()
    assert torch.allclose(columns["log_weights"], torch.log_softmax(rewards, dim=1), atol=1e-12)
    assert torch.allclose(columns["log_z"], torch.logsumexp(rewards, dim=1) - math.log(8), atol=1e-12)


# --- soft values -----------------------------------------------------------------------------------------------------


def soft_value(children, kind="soft"):
    """log E[e^(zeros) | x_s], exact, by look-up; or E[zeros | x_s], which ignores Jensen's gap."""
    agree = ((MODEL.states[:, None] == torch.from_numpy(TOK.strings)) | (MODEL.states[:, None] == 3)).all(-1).double()
    weights = agree * torch.from_numpy(TOK.joint)
    weights = weights / weights.sum(1, keepdim=True)
    zeros = torch.from_numpy(ZEROS).double()
    values = torch.log(weights @ torch.exp(zeros)) if kind == "soft" else weights @ zeros
    base = torch.tensor([64, 16, 4, 1])
    return lambda state, x0_hat, noise: values[(state.x * base).sum(1)].view(-1, children)


# Measured before on this kernel. The bias is O(1/M) with the exact value and softmax; the mean reward keeps one of its
# own; argmax collapses.
SOFT = [
    (2, "softmax", "soft", 0.281), (5, "softmax", "soft", 0.123), (20, "softmax", "soft", 0.029),
    (2, "softmax", "mean", 0.298), (5, "softmax", "mean", 0.161), (20, "softmax", "mean", 0.081),
    (2, "argmax", "soft", 0.141), (5, "argmax", "soft", 0.432), (20, "argmax", "soft", 0.792),
]  # fmt: skip


@pytest.mark.parametrize(("children", "selection", "value", "figure"), SOFT, ids=str)
def test_soft_value_decoding_is_as_near_to_the_tilted_table_as_measured(children, selection, value, figure):
    rows = 5000 if children == 20 else 8000
    strategy = registry.strategies.build(
        {"name": "svdd", "children": children, "strength": 1.0, "selection": selection, "select_last": True}
    )
    x = strategy.decode(sampler_of("first_hitting", 4, MODEL), soft_value(children, value), noise_of(rows)).x0
    assert abs(distance(shares(x), TILTED / TILTED.sum()) - figure) < 0.02


# --- choices among whole strings -------------------------------------------------------------------------------------


def best_of(n):
    """The law of the best of n draws: of equal rewards each string is as likely as it is."""
    found = np.zeros(81)
    for r in range(5):
        here = r == ZEROS
        share = TOK.joint[here].sum()
        below = TOK.joint[r > ZEROS].sum()
        found[here] = TOK.joint[here] / share * ((below + share) ** n - below**n) if share else 0.0
    return found


def test_best_of_n_has_the_law_of_the_largest_of_n():
    rows, exact = 8000, best_of(4)
    assert distance(exact, TOK.joint) > 0.3
    found = shares(outcome({"name": "best_of_n", "n": 4}, rows).x0)
    assert distance(found, exact) < sampling_error(exact, rows)


def majority_of_three():
    """A string that comes twice of three wins; of three different ones the best, or of equal ones each as likely."""
    p, r = TOK.joint, ZEROS
    same = (np.arange(81)[:, None] == np.arange(81)).astype(float)
    found = p**3 + 3 * p**2 * (1 - p)
    others = (1 - same)[:, :, None] * (1 - same)[:, None, :] * (1 - same)[None, :, :]
    wins = [(r[:, None, None] > q) + 0.5 * (r[:, None, None] == q) for q in (r[None, :, None], r[None, None, :])]
    both_equal = (r[:, None, None] == r[None, :, None]) & (r[:, None, None] == r[None, None, :])
    win = np.where(both_equal, 1 / 3, wins[0] * wins[1])
    first = (others * win * p[None, :, None] * p[None, None, :]).sum((1, 2))
    return found + 3 * p * first


def test_the_majority_of_three_has_its_law():
    rows, exact = 8000, majority_of_three()
    assert abs(exact.sum() - 1) < 1e-12
    spec = {"name": "best_of_majority", "n": 3, "threshold": 0.5, "equivalence": "tokens"}
    assert distance(shares(outcome(spec, rows).x0), exact) < sampling_error(exact, rows)
    assert distance(exact, best_of(3)) > 0.1


# --- repulsion -------------------------------------------------------------------------------------------------------

APART = {"name": "token_repulsion", "particles": 4, "pick": 0}


@pytest.mark.parametrize("features", ["pooled", "places"])
@pytest.mark.parametrize("solver", ["ancestral", "first_hitting", "confidence", "remasking"])
def test_the_first_string_is_single_draw_for_draw(solver, features):
    apart = outcome(APART | {"features": features}, 200, solver=solver).x0
    assert torch.equal(apart, outcome({"name": "single"}, 200, solver=solver).x0)


def test_without_strength_repulsion_is_best_of_n():
    apart = outcome({"name": "token_repulsion", "particles": 4, "alpha": 0.0}, 200)
    best = outcome({"name": "best_of_n", "n": 4}, 200)
    assert torch.equal(apart.x0, best.x0)
    assert torch.equal(apart.columns["candidate_rewards"], best.columns["candidate_rewards"])


@pytest.mark.parametrize("features", ["pooled", "places"])
def test_strings_of_a_row_keep_apart_and_their_law_is_biased(features):
    rows = 1000
    free, apart = (
        outcome(APART | {"alpha": alpha, "features": features, "pick": 1, "particles": 2}, rows) for alpha in (0.0, 8.0)
    )
    pushed, before = (x.columns["spread"] for x in (apart, free))
    assert float(pushed.mean() - before.mean()) > 5 * float((pushed - before).std()) / math.sqrt(rows)
    assert distance(shares(free.x0), TOK.joint) < sampling_error(TOK.joint, rows)
    assert distance(shares(apart.x0), TOK.joint) > sampling_error(TOK.joint, rows)


def test_logits_move_by_the_strength_at_the_place_that_moves_most():
    spec = registry.strategies.build(APART | {"alpha": 2.0})
    x = torch.tensor([[3, 3, 3, 3], [3, 0, 3, 3], [3, 3, 3, 3], [0, 1, 2, 0]])
    p = MODEL.denoise(x, 1.0)
    p[2] = p[0]
    moved = spec.push(x, p, 0.5)
    assert torch.equal(moved[0], p[0]) and torch.equal(moved[3], p[3]), "the first, and one without a mask"
    assert torch.equal(moved[1, 1], p[1, 1]), "a fixed token"
    assert torch.equal(moved[2], p[2]), "nowhere to go: its features are those of the first"
    assert ((moved == 0) == (p == 0)).all(), "impossible tokens stay impossible"
    torch.testing.assert_close(moved.sum(-1), torch.ones(4, 4, dtype=torch.float64))
    shift = torch.log(moved[1]) - torch.log(p[1])
    # Logits are known up to a constant; the gradient of a softmax adds up to zero.
    shift = (shift - shift.mean(-1, keepdim=True))[[0, 2, 3]].norm(dim=-1)
    assert float(shift.max()) == pytest.approx(2.0 * 0.5, rel=1e-6)


def test_rows_of_strings_do_not_depend_on_the_split():
    made = recipe(strategy=APART | {"pick": 3})
    whole = generate(made, 0, 9)
    again = np.concatenate([generate(made, 0, 4)["x0"], generate(made, 4, 9)["x0"]])
    np.testing.assert_array_equal(whole["x0"], again)
    assert (whole["nfe"] == made.nfe).all()
    assert made.nfe == 16 and (whole["reward_calls"] == 0).all()


# --- every strategy --------------------------------------------------------------------------------------------------

TRIVIAL = [
    {"name": "best_of_n", "n": 1},
    {"name": "best_of_majority", "n": 1, "equivalence": "tokens"},
    {"name": "adaptive_best_of_n", "max_n": 1},
    {"name": "fk_steering", "particles": 1},
    {"name": "svdd", "children": 1},
    {"name": "token_repulsion", "particles": 1},
]


@pytest.mark.parametrize("solver", ["ancestral", "first_hitting", "remasking"])
@pytest.mark.parametrize("strategy", TRIVIAL, ids=lambda s: s["name"])
def test_one_string_is_single_draw_for_draw(strategy, solver):
    rows = generate(recipe(solver=solver, strategy=strategy), 3, 20)
    single = generate(recipe(solver=solver), 3, 20)
    np.testing.assert_array_equal(rows["x0"], single["x0"])
    assert (rows["nfe"] == single["nfe"]).all()


@pytest.mark.parametrize("name", ["fk_steering", "svdd", "beam"])
def test_copies_of_greedy_strings_are_refused(name):
    greedy = {"name": "confidence", "filters": [{"name": "temperature", "temperature": 0}]}
    with pytest.raises(
        ValueError, match=f"{name} copies .* confidence is deterministic: .* for example solver=ancestral"
    ):
        recipe(solver=greedy, strategy=name)
    recipe(solver=greedy | {"gumbel": 1.0}, strategy=name)
    recipe(solver=greedy)
    with pytest.raises(ValueError, match="shared_noise is found along an ODE, but model table has tokens"):
        recipe(solver=greedy, initial="shared_noise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": {"name": "ancestral", "cache": True}}, "Set solver.cache=false"),
        ({"model": "gmm", "solver": "ddim"}, "Use strategy=repulsion, or a token model"),
    ],
)
def test_repulsion_of_what_it_cannot_move_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(strategy=APART, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"particles": 0}, "particles >= 1 and alpha >= 0"),
        ({"alpha": -1.0}, "particles >= 1 and alpha >= 0"),
        ({"features": "pooling"}, "did you mean 'pooled'"),
        ({"pick": 8}, "pick must be between 0 and 7"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.strategies.build({"name": "token_repulsion"} | fields)
