"""The family of grids that searches use: every point of its box is a grid, and the stock grids are points of it."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks import registry
from tasks.models.gmm import GMM
from tasks.models.table import Table
from tasks.processes import VP, lam_range
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.times.curve import Curve

PROCESSES = {name: GMM(process=name).noising for name in ("vp", "edm", "flow")} | {"cosine": VP("squaredcos_cap_v2")}
EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES)


def grid(process, num_steps, start=1.0, **fields):
    return registry.times.build({"name": "curve", "num_steps": num_steps} | fields)(process, start)


def stock(name, process, num_steps, start=1.0, **fields):
    return registry.times.build({"name": name, "num_steps": num_steps} | fields)(process, start)


def box(name):
    return st.floats(*Curve.box[name])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(PROCESSES)), st.integers(1, 120), box("mix"), box("noise"), box("data"),
    st.sampled_from([1.0, 0.9, 0.5]),
)  # fmt: skip
@example("vp", 1000, 1.0, 4.0, 0.25, 1.0)
@example("flow", 1000, 1.0, 4.0, 0.25, 1.0)
@example("flow", 1000, 1.0, 0.25, 4.0, 1.0)
@example("vp", 1000, 0.5, 4.0, 4.0, 1.0)
@example("cosine", 1000, 0.5, 0.25, 0.25, 1.0)
def test_every_point_of_the_box_is_a_falling_grid(process, num_steps, mix, noise, data, start):
    found = grid(PROCESSES[process], num_steps, start, mix=mix, noise=noise, data=data)
    assert len(found) == num_steps + 1 and (found[0], found[-1]) == (start, 0.0)
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


@EVERY_PROCESS
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 33])
def test_the_stock_grids_are_points_of_the_family(process, num_steps):
    p = PROCESSES[process]
    for start in (1.0, 0.7):
        assert grid(p, num_steps, start, mix=0.0) == stock("uniform", p, num_steps, start)
        for power in (2.0, 0.5, 3.7):
            assert grid(p, num_steps, start, mix=0.0, data=power) == stock(
                "quadratic", p, num_steps, start, power=power
            )
        np.testing.assert_allclose(
            grid(p, num_steps, start, mix=1.0), stock("logsnr", p, num_steps, start), rtol=1e-9, atol=0
        )


@pytest.mark.parametrize(("process", "noise", "data"), [("vp", 1.26, 0.79), ("edm", 1.29, 0.77), ("flow", 1.39, 0.71)])
@pytest.mark.parametrize("num_steps", [4, 10, 40])
def test_the_karras_grid_is_nearly_a_point_of_the_family(process, noise, data, num_steps):
    p = PROCESSES[process]
    low, high = lam_range(p)

    def shares(times):
        return np.array([(p.lam(t) - low) / (high - low) for t in times[1:-1]])

    karras = shares(stock("karras", p, num_steps))
    off = np.abs(shares(grid(p, num_steps, mix=1.0, noise=noise, data=data)) - karras).max()
    assert off < 0.02
    assert off < 0.3 * np.abs(shares(grid(p, num_steps, mix=1.0)) - karras).max()  # nearer than the log-SNR grid


@EVERY_PROCESS
def test_between_its_ends_the_mix_is_the_geometric_mean(process):
    p = PROCESSES[process]
    first, last = (np.log(grid(p, 12, mix=m, noise=1.5, data=0.8)[:-1]) for m in (0.0, 1.0))
    for mix in (0.25, 0.5, 0.9):
        found = np.log(grid(p, 12, mix=mix, noise=1.5, data=0.8)[:-1])
        np.testing.assert_allclose(found, (1 - mix) * first + mix * last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_an_exponent_above_one_crowds_the_nodes_at_its_end(mix):
    p = PROCESSES["vp"]

    def ends(**fields):
        """First and last-but-one step, in the coordinate in which the grid is laid."""
        place = (lambda t: -t) if mix == 0 else p.lam
        found = [place(t) for t in grid(p, 10, mix=mix, **fields)[: 11 if mix == 0 else 10]]
        return found[1] - found[0], found[-1] - found[-2]

    plain, noisy, clean = ends(), ends(noise=2.0), ends(data=2.0)
    assert noisy[0] < plain[0] and clean[1] < plain[1]
    assert ends(noise=0.5)[0] > plain[0] and ends(data=0.5)[1] > plain[1]


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_a_recipe_with_the_uniform_point_is_the_uniform_recipe(process):
    model = {"name": "gmm", "process": process}
    recipe = Recipe(model, "ddim", {"name": "curve", "num_steps": 5}, "none", "single", batch_size=8).completed()
    recipe.check()
    assert np.isfinite(generate(recipe, 0, 8)["x0"]).all()
    at = recipe.override({"times.mix": 0.0})
    assert at.key == recipe.override({"times": {"name": "uniform", "num_steps": 5}}).key
    assert recipe.override({"nfe": 7}).parts.times.num_steps == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_steps": 0}, "num_steps must be at least 1"), ({"mix": 1.1}, "times.mix must be between 0 and 1, got 1.1"),
     ({"mix": -0.1}, "times.mix"), ({"noise": 0.2}, "times.noise must be between 0.25 and 4"), ({"data": 5.0}, "data")],
    ids=str,
)  # fmt: skip
def test_points_outside_the_box_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        registry.times.build({"name": "curve"} | fields)


def test_a_token_model_has_the_grids_in_time_only():
    p = Table().noising
    assert grid(p, 4, mix=0.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    with pytest.raises(ValueError, match="need a Gaussian model"):
        grid(p, 4)


def test_the_documented_ends_of_the_warp():
    warp = Curve(noise=2.0, data=3.0)._left
    assert (warp(0.0), warp(1.0)) == (1.0, 0.0)
    assert 1 - warp(1e-3) == pytest.approx(3 * 1e-3**2, rel=1e-4)
    assert warp(1 - 1e-4) == pytest.approx((2 * 1e-4) ** 3, rel=1e-3)
    assert math.isclose(warp(0.5), 0.75**3)
