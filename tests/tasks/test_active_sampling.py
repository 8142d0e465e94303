"""Active sampling: which entry of a measurement is looked up next."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.strategies.active_sampling import entropy_bound

torch.set_num_threads(1)

# Elements 0 and 1 are nearly the same number, with the largest variances; element 2 is independent, element 3 is fixed.
COVARIANCE = [[4.0, 3.8, 0.0, 0.0], [3.8, 3.7, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.01]]
MODEL = {"name": "gmm", "means": [[0.0] * 4], "covariances": [COVARIANCE]}
REWARD = {"name": "measurement", "operator": "all", "sigma_y": 0.05, "model": MODEL}


def recipe(strategy, **changes):
    fields = {"model": MODEL, "solver": {"name": "ddim", "eta": 1.0}, "guidance": "none", "strategy": strategy}
    fields |= {"times": {"name": "uniform", "num_steps": 50}, "batch_size": 512, "labels": None, "reward": REWARD}
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


def test_the_bound_is_the_sum_that_it_says():
    values = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for j in range(3):
        inner = [np.mean([math.exp(-((a - b) ** 2) / (2 * 0.7**2)) for b in values[1, :, j]]) for a in values[1, :, j]]
        assert entropy_bound(values, 0.7)[1, j] == pytest.approx(-np.mean(np.log(inner)), rel=1e-12)


def test_the_bound_lies_between_agreement_and_all_different():
    same, apart = torch.full((1, 6, 1), 2.0), 100 * torch.arange(6.0).view(1, 6, 1)
    assert entropy_bound(same.double(), 1.0).item() == pytest.approx(0.0, abs=1e-12)
    assert entropy_bound(apart.double(), 1.0).item() == pytest.approx(math.log(6))


def test_a_large_width_ranks_like_the_variance():
    scale = torch.linspace(0.1, 3.0, 40, dtype=torch.float64)[
        torch.randperm(40, generator=torch.Generator().manual_seed(1))
    ]
    values = scale * torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    by_entropy, by_variance = entropy_bound(values, 1e3)[0].argsort(), values.var(dim=1)[0].argsort()
    assert torch.equal(by_entropy, by_variance)


def test_a_small_width_counts_different_values_where_variance_measures_distance():
    two_clusters = torch.tensor([-5.0, -5.0, -5.0, 5.0, 5.0, 5.0])  # variance 25, two values
    spread = torch.linspace(-1.0, 1.0, 6)  # variance 0.5, six values
    values = torch.stack([two_clusters, spread], dim=1)[None].double()
    wide, narrow = entropy_bound(values, 100.0)[0], entropy_bound(values, 0.05)[0]
    assert wide[0] > wide[1] and narrow[0] < narrow[1]
    np.testing.assert_allclose(narrow, [math.log(2), math.log(6)], rtol=1e-6)


def test_a_location_that_is_known_already_through_another_is_not_looked_up():
    strategy = {"name": "active_sampling", "n": 16, "acquisitions": 2, "window": [0.4, 1.0], "zeta": 0.4}
    rows = generate(recipe(strategy, times={"name": "uniform", "num_steps": 100}), 0, 64)
    # First the largest variance; then the independent element, though the other's prior variance is 3.7 times its own.
    assert (rows["locations"][:, 0] == 0).mean() > 0.9
    assert (rows["locations"][:, 1] == 2).mean() > 0.9
    still = generate(recipe(strategy | {"zeta": 0.0}, times={"name": "uniform", "num_steps": 100}), 0, 64)
    assert (still["locations"][:, 1] == 1).mean() > 0.9  # without guidance nothing is learnt from the first


def test_what_was_looked_up_is_fitted():
    strategy = {"name": "active_sampling", "n": 8, "acquisitions": 3, "window": [0.0, 0.5], "zeta": 0.3}
    made = recipe(strategy)
    rows = generate(made, 0, 128)
    y = made.parts.reward.at(torch.arange(128)).y.numpy()
    seen = rows["locations"]
    off = np.take_along_axis(np.abs(rows["x0"] - y), seen, axis=1)
    free = np.take_along_axis(np.abs(generate(recipe("single"), 0, 128)["x0"] - y), seen, axis=1)
    assert off.mean() < free.mean() / 3


def test_all_locations_can_be_looked_up_at_once():
    strategy = {"name": "active_sampling", "n": 2, "acquisitions": 4, "window": [0.0, 0.02]}
    locations = generate(recipe(strategy), 0, 8)["locations"]
    assert (np.sort(locations, axis=1) == np.arange(4)).all()


def test_the_schedule_spreads_the_acquisitions_over_the_window():
    plan = registry.strategies.build({"name": "active_sampling", "acquisitions": 4, "window": [0.2, 0.6]}).schedule(20)
    assert [i for i, count in enumerate(plan) for _ in range(count)] == [4, 6, 8, 10]
    assert sum(registry.strategies.build({"name": "active_sampling"}).schedule(3)) == 20


@pytest.mark.parametrize("n", [1, 4])
def test_without_acquisitions_it_is_single_draw_for_draw(n):
    none = generate(recipe({"name": "active_sampling", "n": n, "acquisitions": 0}, dtype="float64"), 0, 16)
    np.testing.assert_array_equal(none["x0"], generate(recipe("single", dtype="float64"), 0, 16)["x0"])
