"""generate and score: every row is a function of (recipe, index)."""

import math

import numpy as np
import pytest
import tiny_weights
import torch

from tasks import registry, run
from tasks.noise import MAX_INDEX
from tasks.processes import VP
from tasks.recipe import Recipe
from tasks.run import blocks, generate, rows_per_block, score

TIMING = "seconds"


def recipe(**changes):
    fields = {"model": "gmm", "solver": "ddim", "guidance": "none", "strategy": "single"}
    fields |= {"times": {"name": "uniform", "num_steps": 4}, "batch_size": 16}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


BEST = {"strategy": {"name": "best_of_n", "n": 3}, "reward": "ink"}
LABELLED = {"name": "gmm", "labels": True}
STUDIES = {
    "gmm": {"solver": {"name": "ddim", "eta": 1.0}},
    "gmm guided": {"model": LABELLED, "guidance": "cfg", "solver": "dpmpp_2m"},
    "gmm best": {"solver": {"name": "ddim", "eta": 0.5}} | BEST,
    "gmm stock": {"solver": {"name": "diffusers", "scheduler": "DDPMScheduler"}, "times": {"name": "stock"}},
    "table": {"model": "table", "solver": "ancestral"},
    "table best": {"model": "table", "solver": "ancestral"} | BEST,
    "digits": {"model": "digits", "solver": "heun", "times": {"name": "uniform", "num_steps": 2}},
    "digits best": {"model": "digits", "times": {"name": "uniform", "num_steps": 2}} | BEST,
}


def assert_same_rows(a, b):
    assert a.keys() == b.keys()
    for name in a.keys() - {TIMING}:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def join(pieces):
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", STUDIES)
def test_rows_do_not_depend_on_how_the_range_is_split(study):
    made = recipe(**STUDIES[study])
    whole = generate(made, 3, 35)
    # 16 rows a block (5 with three candidates): these edges cut blocks at their start, middle and end.
    for edges in ([3, 35], [3, 16, 32, 35], [3, 4, 17, 31, 35]):
        pieces = [generate(made, a, b) for a, b in zip(edges, edges[1:], strict=False)]
        assert_same_rows(join(pieces), whole)


@pytest.mark.parametrize("study", STUDIES)
def test_rows_do_not_depend_on_global_random_state(study):
    made = recipe(**STUDIES[study])
    torch.manual_seed(0)
    first = generate(made, 0, 3)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    assert_same_rows(generate(made, 0, 3), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("study", STUDIES)
def test_an_isolated_row_is_the_same_row(study):
    made = recipe(**STUDIES[study])
    whole = generate(made, 0, 20)
    for index in (0, 6, 17):
        alone = generate(made, index, index + 1, isolated=True)
        assert_same_rows(alone, {name: column[index : index + 1] for name, column in whole.items()})


def test_isolation_keeps_the_neighbours_out_of_the_network(monkeypatch):
    made, seen = recipe(), []
    base = run.load_model(made)

    class Watched:
        def __getattr__(self, name):
            return getattr(base, name)

        def denoise(self, x, t, cond):
            seen.append(len(x.unique(dim=0)))
            return base.denoise(x, t, cond)

    monkeypatch.setattr(run, "load_model", lambda _: Watched())
    generate(made, 4, 6, isolated=True)
    assert set(seen) == {2}
    generate(made, 4, 6)
    assert seen[-1] == 16


@pytest.mark.parametrize("study", STUDIES)
def test_rows_have_the_stated_columns(study):
    made = recipe(**STUDIES[study])
    rows = generate(made, 5, 9)
    assert rows["sample_id"].tolist() == [5, 6, 7, 8]
    expected = [made.label(i) for i in range(5, 9)] if made.has_labels else [-1] * 4
    assert rows["label"].tolist() == expected
    assert rows["x0"].shape == (4, *made.parts.model.shape)
    assert (rows["seconds"] > 0).all()
    assert all(len(column) == 4 for column in rows.values())


def test_seeds_make_other_rows():
    a, b = (generate(recipe(seed=seed), 0, 8)["x0"] for seed in (0, 1))
    assert not np.isclose(a, b).any()


def test_rows_differ_from_one_another():
    x = generate(recipe(), 0, 64)["x0"]
    assert len(np.unique(x, axis=0)) == 64


def test_trials_share_their_noise():
    # Common random numbers: two solvers on one seed land close to each other, two seeds do not.
    fine = {"name": "uniform", "num_steps": 64}
    a = generate(recipe(times=fine), 0, 64)["x0"]
    b = generate(recipe(times=fine, solver="heun"), 0, 64)["x0"]
    c = generate(recipe(times=fine, seed=1), 0, 64)["x0"]
    assert np.abs(a - b).mean() < 0.05
    assert np.abs(a - c).mean() > 0.2


def test_states_come_in_the_dtype_of_the_recipe():
    assert generate(recipe(dtype="float64"), 0, 2)["x0"].dtype == np.float64
    assert generate(recipe(), 0, 2)["x0"].dtype == np.float32
    single, double = (generate(recipe(dtype=dtype), 0, 8)["x0"] for dtype in ("float32", "float64"))
    np.testing.assert_allclose(single, double, atol=1e-5)


def test_the_last_index_can_be_made():
    rows = generate(recipe(), MAX_INDEX - 2, MAX_INDEX)
    assert rows["sample_id"].tolist() == [MAX_INDEX - 2, MAX_INDEX - 1]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (5, 3), (0, MAX_INDEX + 1)])
def test_an_impossible_range_is_refused(start, stop):
    with pytest.raises(ValueError, match="sample indices must satisfy"):
        generate(recipe(), start, stop)


def test_blocks_tile_a_range_at_fixed_boundaries():
    assert list(blocks(3, 20, 8)) == [(0, 3, 8), (8, 8, 16), (16, 16, 20)]
    assert list(blocks(8, 16, 8)) == [(8, 8, 16)]
    assert list(blocks(9, 10, 8)) == [(8, 9, 10)]


@pytest.mark.parametrize(("batch", "particles", "rows"), [(16, 1, 16), (16, 4, 4), (16, 3, 5), (2, 4, 1)])
def test_a_batch_is_divided_among_the_particles(batch, particles, rows):
    strategy = {"name": "best_of_n", "n": particles}
    assert rows_per_block(recipe(batch_size=batch, strategy=strategy, reward="ink")) == rows


def test_progress_reports_the_rows_done():
    seen = []
    generate(recipe(), 10, 40, progress=seen.append)
    assert seen == [6, 22, 30]


def test_no_call_to_the_network_exceeds_the_batch(monkeypatch):
    sizes = []
    base = run.load_model(recipe())

    class Watched:
        def __getattr__(self, name):
            return getattr(base, name)

        def denoise(self, x, t, cond):
            sizes.append(len(x))
            return base.denoise(x, t, cond)

    monkeypatch.setattr(run, "load_model", lambda _: Watched())
    generate(recipe(**BEST | {"batch_size": 2}), 0, 2)  # three candidates a row, two rows a call
    assert set(sizes) == {1, 2}
    sizes.clear()
    generate(recipe(), 0, 20)
    assert set(sizes) == {16}  # a short batch is padded


# --- best of n -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gmm", "table", "digits"])
def test_best_of_one_is_single_draw_for_draw(model):
    fields = {"model": model, "solver": "ancestral" if model == "table" else {"name": "ddim", "eta": 1.0}}
    single = generate(recipe(**fields), 0, 20)
    assert_same_rows(generate(recipe(**fields, strategy={"name": "best_of_n", "n": 1}), 0, 20), single)


@pytest.mark.parametrize("model", ["gmm", "table", "digits"])
def test_a_candidate_is_the_same_sample_for_every_n(model):
    fields = {
        "model": model,
        "solver": "ancestral" if model == "table" else {"name": "ddim", "eta": 1.0},
        "reward": "ink",
    }
    rewards = {
        n: generate(recipe(**fields, strategy={"name": "best_of_n", "n": n}), 0, 8)["candidate_rewards"] for n in (2, 4)
    }
    assert rewards[4].shape == (8, 4)
    np.testing.assert_array_equal(rewards[4][:, :2], rewards[2])
    single = generate(recipe(**fields), 0, 8)
    ink = score({"name": "ink"}, single["x0"], single["label"], 0, 16, "cpu")
    np.testing.assert_allclose(rewards[2][:, 0], ink, rtol=0, atol=1e-6)


def test_best_of_n_keeps_the_candidate_with_the_largest_reward():
    rows = generate(recipe(**BEST), 0, 32)
    np.testing.assert_array_equal(rows["slot"], rows["candidate_rewards"].argmax(axis=1))
    kept = score({"name": "ink"}, rows["x0"], rows["label"], 0, 16, "cpu")
    np.testing.assert_allclose(kept, rows["candidate_rewards"].max(axis=1), rtol=1e-6)
    assert set(rows["slot"].tolist()) == {0, 1, 2}


def test_candidates_carry_the_label_of_their_row():
    # Separated components: the sign of a sample tells the label that it was made with.
    model = {"name": "gmm", "means": [[-1.0], [1.0]], "covariances": [0.05, 0.05], "labels": True}
    rows = generate(recipe(model=model, **BEST), 0, 30)
    np.testing.assert_array_equal(np.sign(rows["x0"][:, 0]), 2 * rows["label"] - 1)
    np.testing.assert_array_equal(np.sign(2 * rows["candidate_rewards"] - 1), np.tile(2 * rows["label"] - 1, (3, 1)).T)


def test_best_of_n_reaches_the_expected_maximum_of_n_normals():
    # Data N(0, 1): the ink reward is (x + 1) / 2, and DDIM multiplies the N(0, 1) prior by a known number, because the
    # denoiser is x0_hat = alpha x and eps_hat = sigma x.
    n, rows, steps = 8, 4000, 10
    process, times = VP(), [1 - i / steps for i in range(steps)] + [0.0]
    gain = math.prod(
        process.alpha(s) * process.alpha(t) + process.sigma(s) * process.sigma(t)
        for t, s in zip(times, times[1:], strict=False)
    )
    expected, spread = 1.4236003, math.sqrt(0.372897)  # mean and deviation of the largest of 8 standard normals
    made = recipe(
        model={"name": "gmm", "means": [[0.0]], "covariances": [[1.0]]},
        times={"name": "uniform", "num_steps": steps},
        strategy={"name": "best_of_n", "n": n},
        reward="ink",
        batch_size=8192,
    )
    x = generate(made, 0, rows)["candidate_rewards"] * 2 - 1
    assert abs(x.max(axis=1).mean() - gain * expected) < 5 * gain * spread / math.sqrt(rows)
    assert abs(x.mean()) < 5 * gain / math.sqrt(rows * n)
    # Every prefix of the candidates is a smaller best-of-k: 0.8463 is the expected maximum of three.
    three = x[:, :3].max(axis=1).mean()
    assert abs(three - gain * 0.8462844) < 5 * gain * math.sqrt(0.559467) / math.sqrt(rows)


def test_reward_calls_are_counted():
    assert (generate(recipe(**BEST), 0, 4)["reward_calls"] == 3).all()
    assert (generate(recipe(), 0, 4)["reward_calls"] == 0).all()
    one = recipe(strategy={"name": "best_of_n", "n": 1}, reward="ink")
    assert (generate(one, 0, 4)["reward_calls"] == 0).all()


# --- nfe -------------------------------------------------------------------------------------------------------------

STOCK = ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]
SPECIAL = {"diffusers", "dopri5", "flow_sde", "rectified_flow", "dpm_solver_v3"}  # measured in tests of their own
SOLVERS = [
    {"name": name}
    for name in registry.solvers.names()
    if name not in SPECIAL and getattr(registry.solvers.get(name), "needs", "posterior_mean") == "posterior_mean"
]
SOLVERS += [{"name": "dpm_solver_v3", "statistics": "data"}]
SOLVERS += [{"name": "heun", "leading_euler_steps": 1}, {"name": "ddim", "eta": 1.0}]
SOLVERS += [{"name": "diffusers", "scheduler": scheduler} for scheduler in STOCK]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_nfe_column_is_what_the_recipe_says(solver, num_steps):
    if registry.solvers.get(solver["name"]).process == "masked":
        every = {"window_low": 0.0, "window_high": 1.0} if solver["name"] == "edlm" else {}
        five = {"name": "table", "length": 5}
        made = recipe(model=five, solver=solver | every, times={"name": "uniform", "num_steps": num_steps})
        assert (generate(made, 0, 2)["nfe"] == made.nfe).all()
        return
    grid = "stock" if solver["name"] == "diffusers" else "uniform"
    if solver.get("scheduler") == "PNDMScheduler":
        num_steps += 3  # its Runge-Kutta start takes four steps
    times = {"name": grid, "num_steps": num_steps}
    made = recipe(model=LABELLED, solver=solver, times=times)
    guided = recipe(model=LABELLED, solver=solver, times=times, guidance="cfg")
    wide = recipe(model=LABELLED, solver=solver, times=times, **BEST)
    plain = generate(made, 0, 2)["nfe"]
    assert (plain == made.nfe).all()
    assert guided.nfe == 2 * made.nfe
    assert (generate(guided, 0, 2)["nfe"] == guided.nfe).all()
    assert wide.nfe == 3 * made.nfe
    assert (generate(wide, 0, 2)["nfe"] == wide.nfe).all()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_the_nfe_column_is_what_the_recipe_says_when_a_run_stops_before_the_data(solver):
    made = recipe(solver=solver, times={"name": "explicit", "values": [1.0, 0.6, 0.3, 0.1]})
    assert (generate(made, 0, 2)["nfe"] == made.nfe).all()


# --- numbers that are none -------------------------------------------------------------------------------------------


def broken(base, value, row):
    """A model whose decoder puts ``value`` into one row of every batch."""

    class Broken:
        def __getattr__(self, name):
            return getattr(base, name)

        def decode(self, x0, cond=None):
            x0 = base.decode(x0).clone()
            x0[row] = value
            return x0

    return Broken()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_refused_with_its_index(monkeypatch, value):
    made = recipe()
    base = run.load_model(made)
    monkeypatch.setattr(run, "load_model", lambda _: broken(base, value, 5))
    with pytest.raises(ValueError, match=f"sample 21 of {made.key} is not finite"):
        generate(made, 20, 30)
    generate(made, 6, 16)  # row 5 of the block is not asked for


def test_a_reward_that_is_not_finite_is_refused_with_its_row(monkeypatch):
    made = recipe(**BEST)

    def reward(self, samples, cond):
        values = samples.flatten(1).mean(dim=1)
        values[7] = math.nan
        return values

    monkeypatch.setattr(registry.rewards.get("ink"), "__call__", reward)
    with pytest.raises(ValueError, match="reward ink returned nan for row 7 of a batch"):
        generate(made, 0, 4)


def test_a_reward_must_be_one_number_per_sample(monkeypatch):
    monkeypatch.setattr(registry.rewards.get("ink"), "__call__", lambda self, samples, cond: samples)
    with pytest.raises(ValueError, match=r"reward ink returned shape \(15, 2\) for 15 samples"):
        generate(recipe(**BEST), 0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_index(monkeypatch, value):
    def reward(self, samples, cond):
        return torch.where(samples[:, 0] == 37, value, 0.0)

    monkeypatch.setattr(registry.rewards.get("ink"), "__call__", reward)
    samples = np.arange(30, 50, dtype=np.float32)[:, None]
    with pytest.raises(ValueError, match="scorer ink is not finite at sample 37"):
        score({"name": "ink"}, samples, np.zeros(20, dtype=np.int64), 30, 8, "cpu")


def test_a_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch sees no CUDA device"):
        generate(recipe(device="cuda"), 0, 1)


# --- score -----------------------------------------------------------------------------------------------------------


SCORERS = [
    *(("reward", name) for name in registry.rewards.names()),
    # An Inception network takes a second for a batch; test_inception.py asks it about one picture.
    *(("features", name) for name in registry.features.names() if not name.startswith("inception")),
]


@pytest.mark.parametrize(("kind", "name"), SCORERS, ids=[name for _, name in SCORERS])
def test_scores_do_not_depend_on_how_the_range_is_split(kind, name):
    spec = {"name": name} | tiny_weights.fields(kind, name)
    rng = np.random.default_rng(0)
    samples = rng.uniform(-1, 1, (40, 1, 8, 8)).astype(np.float32)
    labels = np.arange(40) % 10
    others = rng.uniform(-1, 1, samples.shape) if hasattr(registry.scorer(spec), "companion") else None
    whole = score(spec, samples, labels, 5, 16, "cpu", others)
    assert len(whole) == 40
    assert whole.dtype == np.float32
    for edges in ([0, 11, 27, 40], [0, 1, 12, 39, 40]):
        pieces = [
            score(spec, samples[a:b], labels[a:b], 5 + a, 16, "cpu", None if others is None else others[a:b])
            for a, b in zip(edges, edges[1:], strict=False)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_scores_are_those_of_the_scorer_itself():
    rng = np.random.default_rng(0)
    samples, labels = rng.uniform(-1, 1, (20, 1, 8, 8)).astype(np.float32), np.arange(20) % 10
    for name in registry.rewards.names():
        spec = {"name": name} | tiny_weights.fields("reward", name)
        reward = registry.rewards.build(spec)
        scorer = reward.at(torch.arange(3, 23)) if hasattr(reward, "at") else reward
        direct = scorer(torch.from_numpy(samples), torch.from_numpy(labels))
        np.testing.assert_allclose(score(spec, samples, labels, 3, 16, "cpu"), direct, rtol=1e-5, atol=1e-6)


def test_the_identity_keeps_tokens():
    rows = generate(recipe(model="table", solver="ancestral"), 0, 20)
    column = score({"name": "identity"}, rows["x0"], rows["label"], 0, 16, "cpu")
    np.testing.assert_array_equal(column.astype(np.int64), rows["x0"])
