"""The variance filter on a model that interpolates between modes, and as a rejection sampler."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedModel, Sampler
from tasks.strategies.variance_filter import watched

torch.set_num_threads(1)

MODES = {"name": "gmm", "means": [[-2.0], [0.0], [2.0]], "covariances": [0.05, 0.05, 0.05]}


class Smoothed:
    """A network that cannot follow the jumps of the score: which mode a state belongs to is blurred by ``width``."""

    def __init__(self, modes, variance, width, process):
        self._modes, self._variance, self._width = torch.tensor(modes, dtype=torch.float64), variance, width
        self.process, self.shape, self.num_classes = process, (1,), 0

    def denoise(self, x, t, cond=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        off, total = x - alpha * self._modes, alpha**2 * self._variance + sigma**2
        share = torch.softmax(-(off**2) / 2 / (total + self._width**2), dim=1)
        return (share * (self._modes + alpha * self._variance / total * off)).sum(1, keepdim=True)


def recipe(strategy, num_steps=20, **changes):
    fields = {"model": MODES, "solver": "ddim", "guidance": "none", "strategy": strategy, "batch_size": 16}
    fields |= {"times": {"name": "uniform", "num_steps": num_steps}, "dtype": "float64"}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def auc(score, positive):
    order = score.argsort()
    ranks = np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    count = positive.sum()
    return (ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(score) - count))


def test_hallucinations_between_modes_waver_at_the_end():
    modes, std = [-8.0, 0.0, 8.0], 0.1
    model = Smoothed(modes, std**2, 2.5, registry.models.build(MODES).noising)
    solver = registry.solvers.build({"name": "ddim", "eta": 1.0})
    sampler = Sampler(CountedModel(model, 10**6), solver, tuple(np.linspace(1.0, 0.0, 1001)))
    noise = RowNoise(0, torch.arange(1000), dtype=torch.float64)
    found = {}
    for last in (20, 100):
        state, h = watched(sampler, noise, last)
        away = np.abs(state.x.numpy() - np.array(modes)).min(1) > 5 * std  # 47 of 1,000
        found[last] = auc(h.numpy(), away)
    assert 20 < away.sum() < 100
    assert found[100] >= 0.96  # measured 0.990
    assert found[20] < 0.9  # measured 0.62: the window must reach back to where modes are decided
    rejected = h.numpy() > np.quantile(h.numpy(), 0.94)
    assert away[~rejected].sum() < 0.3 * away.sum()  # 94% kept, and at most 28% of the hallucinations with them


def test_h_is_the_variance_of_the_last_predictions():
    made = recipe("single", 12)
    model = made.parts.model.load("cpu")
    times = made.parts.times(model.process)
    noise = RowNoise(0, torch.arange(5), dtype=torch.float64)
    sampler = Sampler(CountedModel(model, 100), made.parts.solver, times)
    state, seen = sampler.start(noise), []
    for _ in range(12):
        state = sampler.step(state, noise)
        seen.append(state.x0_hat.numpy())
    last, h = watched(sampler, noise, 4)
    np.testing.assert_array_equal(last.x, state.x)
    np.testing.assert_allclose(h, np.var(seen[-4:], axis=0).mean(1), rtol=1e-9)
    rows = generate(recipe({"name": "variance_filter", "n": 1, "window": 4 / 12}, 12), 0, 5)
    np.testing.assert_allclose(rows["trajectory_variance"], h, rtol=1e-9)


def test_one_trajectory_is_single_draw_for_draw_with_one_more_column():
    one, plain = (generate(recipe(s), 0, 16) for s in ({"name": "variance_filter", "n": 1}, "single"))
    assert one.keys() - plain.keys() == {"trajectory_variance"}
    for name in plain.keys() - {"seconds"}:
        np.testing.assert_array_equal(one[name], plain[name])


def test_the_first_trajectory_under_the_threshold_is_kept_or_else_the_smallest():
    n, rows = 4, 48
    solver = {"name": "ddim", "eta": 1.0}
    made = recipe({"name": "variance_filter", "n": n, "threshold": 0.001}, solver=solver)
    model = made.parts.model.load("cpu")
    noise = RowNoise(0, torch.arange(rows), dtype=torch.float64)
    sampler = Sampler(CountedModel(model, 10**4), made.parts.solver, made.parts.times(model.process))
    runs = [watched(sampler, noise.slot(k), 4) for k in range(n)]
    h, x = np.stack([r[1].numpy() for r in runs]), np.stack([r[0].x.numpy() for r in runs])
    limit = float(np.quantile(h, 0.4))
    expected = [next((k for k in range(n) if h[k, i] <= limit), h[:, i].argmin()) for i in range(rows)]
    passes = [next((k + 1 for k in range(n) if h[k, i] <= limit), n) for i in range(rows)]
    assert len(set(expected)) == n and (h.min(0) > limit).any()
    found = generate(recipe({"name": "variance_filter", "n": n, "threshold": limit}, solver=solver), 0, rows)
    assert found["slot"].tolist() == expected
    assert found["candidates"].tolist() == passes
    assert found["nfe"].tolist() == [20 * k for k in passes]
    np.testing.assert_allclose(found["x0"], x[expected, np.arange(rows)], rtol=1e-9)
    np.testing.assert_allclose(found["trajectory_variance"], h[expected, np.arange(rows)], rtol=1e-7)


def test_the_calibration_rejects_the_fraction_that_was_asked_for():
    made = recipe({"name": "variance_filter", "n": 2, "discard": 0.25, "pilot": 2000}, batch_size=1024)
    assert [c.place for c in made.calibrations] == ["strategy"]
    rows = generate(made, 0, 2048)
    rejected = (rows["candidates"] > 1).mean()
    # The quantile of 2,000 and the fraction of 2,048 both have the standard error of a proportion.
    assert rejected == pytest.approx(0.25, abs=5 * math.sqrt(2 * 0.25 * 0.75 / 2000))


def test_the_threshold_belongs_to_the_sampler_and_not_to_the_number_of_candidates():
    def key(**changes):
        return recipe({"name": "variance_filter"} | changes.pop("strategy", {}), **changes).calibrations[0].key

    assert key() == key(strategy={"n": 7}) == key(seed=3)
    assert len({key(), key(solver="heun"), key(num_steps=21), key(strategy={"window": 0.5})}) == 4
    assert recipe({"name": "variance_filter", "n": 1}).calibrations == ()
    assert recipe({"name": "variance_filter", "threshold": 0.1}).calibrations == ()


def test_rows_do_not_depend_on_how_the_range_is_split():
    made = recipe({"name": "variance_filter", "n": 3, "discard": 0.5, "pilot": 64})
    whole = generate(made, 3, 35)
    pieces = [generate(made, a, b) for a, b in ((3, 4), (4, 17), (17, 35))]
    for name in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), whole[name], err_msg=name)
    alone = generate(made, 9, 10, isolated=True)
    np.testing.assert_array_equal(alone["x0"][0], whole["x0"][6])


def test_a_network_is_always_given_whole_batches():
    sizes = []
    made = recipe({"name": "variance_filter", "n": 4, "threshold": 0.0})
    model = made.parts.model.load("cpu")
    watched_model = SimpleNamespace(
        process=model.process,
        shape=model.shape,
        num_classes=0,
        denoise=lambda x, t, cond: sizes.append(len(x)) or model.denoise(x, t, cond),
    )
    noise = RowNoise(0, torch.arange(8), dtype=torch.float64)
    sampler = Sampler(CountedModel(watched_model, 100), made.parts.solver, made.parts.times(model.process))
    made.parts.strategy(sampler, None, noise)
    assert set(sizes) == {8} and len(sizes) == 4 * 20


def test_the_account_is_an_upper_bound():
    strategy = registry.strategies.build({"name": "variance_filter", "n": 3})
    assert strategy.account([1, 2]).nfe == 9 and not strategy.account([1, 2]).exact
    assert registry.strategies.build({"name": "variance_filter", "n": 1}).account([1, 2]).exact


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ({"n": 0}, {}, "strategy.n must be at least 1"),
        ({"window": 0.0}, {}, "0 < strategy.window <= 1"),
        ({"discard": 1.0}, {}, "0 <= strategy.discard < 1"),
        ({}, {"model": "table", "solver": "ancestral"}, "needs the clean prediction of every step"),
    ],
)
def test_impossible_settings_are_refused(strategy, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe({"name": "variance_filter"} | strategy, **changes)
