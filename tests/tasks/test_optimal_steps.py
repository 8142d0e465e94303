"""The grid whose first-order run ends nearest to the many-step solution, against the best of all grids."""

import itertools
import math

import numpy as np
import pytest
import torch

from tasks import calibration, registry
from tasks.calibration import FIRST_INDEX
from tasks.noise import RowNoise
from tasks.recipe import Recipe, grid_of
from tasks.run import generate, load_model
from tasks.sampler import CountedModel, Sampler
from tasks.trajectories import fine_grid

# Mixtures whose runs part: in 16 dimensions the nearest state at a node is often not the one that ends nearest.
WIDE = {"means": (2 * np.random.default_rng(0).normal(size=(5, 16))).tolist(), "covariances": [0.3] * 5}


def recipe_of(model, solver="ddim", guidance="none", seed=0, dtype="float64", batch_size=1024, **times):
    """A recipe on the grid; ``model`` is a process of gmm or a model's spec."""
    model = {"name": "gmm", "process": model} if isinstance(model, str) else model
    times = {"name": "optimal_steps", "num_samples": 64} | times
    return Recipe(model, solver, times, guidance, "single", seed=seed, dtype=dtype, batch_size=batch_size).completed()


def made(recipe):
    return calibration.make(recipe, recipe.calibrations[0], recipe.parts)


class Runs:
    """Real first-order runs of a recipe's model, and their distance to the many-step solution from the same noise."""

    def __init__(self, recipe, rows, first=FIRST_INDEX, num_fine=128):
        model = load_model(recipe)
        self.counted = CountedModel(recipe.parts.guidance.wrap(model), 256)
        self.noise = RowNoise(recipe.seed, torch.arange(rows) + first, dtype=getattr(torch, recipe.dtype))
        self.cond = torch.tensor([recipe.label(i) for i in range(rows)]) if model.num_classes else None
        self.fine = fine_grid(model.process, num_fine)
        self.end = self._run("dpmpp_2m", self.fine)

    def _run(self, solver, grid):
        with torch.no_grad():
            return Sampler(self.counted, registry.solvers.build(solver), tuple(grid), self.cond).run(self.noise).x

    def error(self, grid):
        return float((self._run("ddim", grid) - self.end).flatten(1).double().square().sum(1).mean().sqrt())

    def best(self, candidates, num_steps):
        """The least error over all grids of so many steps, and its grid."""
        inner = itertools.combinations(candidates[1:-1], num_steps - 1)
        return min((self.error(grid), grid) for grid in ((candidates[0], *nodes, candidates[-1]) for nodes in inner))


# --- against enumeration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 5])
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_dynamic_programming_finds_the_optimum_that_enumeration_finds(process, num_steps, seed):
    recipe = recipe_of(process, seed=seed, num_steps=num_steps, num_fine=48, stride=5)
    runs = Runs(recipe, 64, num_fine=48)
    candidates = (*runs.fine[:-1:5], 0.0)
    assert len(candidates) == 11
    error, grid = runs.best(candidates, num_steps)
    found, _ = made(recipe)
    assert tuple(found["times"]) == grid
    assert float(found["error"]) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_keeping_all_is_enumeration_where_keeping_one_is_not(process):
    model = {"name": "gmm", "process": process} | WIDE
    errors = {}
    for width in (1, 4, None):
        recipe = recipe_of(model, seed=2, num_steps=4, stride=12, width=width, num_samples=16)
        arrays, _ = made(recipe)
        errors[width] = float(arrays["error"])
    runs = Runs(recipe, 16)
    error, grid = runs.best((*runs.fine[:-1:12], 0.0), 4)
    assert tuple(arrays["times"]) == grid and errors[None] == pytest.approx(error, rel=1e-9)
    # One state a node ends 1.42 (VP) and 1.47 times (flow) as far away.
    assert errors[4] == errors[None] < 0.75 * errors[1]


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_more_steps_end_nearer_and_every_grid_falls_from_one_to_zero(process):
    errors = []
    for steps in (1, 2, 4, 8):
        arrays, _ = made(recipe_of(process, num_steps=steps, num_fine=64))
        grid = arrays["times"]
        assert len(grid) == steps + 1 and (grid[0], grid[-1]) == (1.0, 0.0) and (np.diff(grid) < 0).all()
        errors.append(float(arrays["error"]))
    assert (np.diff(errors) < 0).all()


def test_it_ends_nearer_on_noise_that_it_never_saw_than_other_grids():
    for process in ("vp", "flow"):
        recipe = recipe_of(process, num_steps=5, num_samples=128)
        runs = Runs(recipe, 256, first=0)
        found = runs.error(grid_of(calibration.bound(recipe, calibration.make_all(recipe)))[0])
        # VP: .24 against .38 and .30; flow: .24 against .26 and .33.
        for other in ("uniform", "quadratic"):
            spec = registry.times.build({"name": other, "num_steps": 5})
            assert found < 0.98 * runs.error(spec(recipe.parts.model.noising))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits", "digits_flow"])
def test_on_digits_five_steps_end_nearer_than_on_other_grids(model):
    recipe = recipe_of({"name": model}, num_steps=5, num_samples=128, dtype="float32", batch_size=64)
    # A few rows that change basin make most of the error, so it takes many. Digits: .937 against .992 and 1.042; their
    # flow: .856 against .890 and 1.126.
    runs = Runs(recipe, 512, first=0)
    found = runs.error(grid_of(calibration.bound(recipe, calibration.make_all(recipe)))[0])
    for other in ("uniform", "quadratic"):
        spec = registry.times.build({"name": other, "num_steps": 5})
        assert found < runs.error(spec(recipe.parts.model.noising))


# --- as a calibration ------------------------------------------------------------------------------------------------


def kept_states(num_steps, candidates, width):
    """States kept before the last step: all runs that reach a node, at most ``width``."""
    return 1 + sum(
        min(width, math.comb(j - 1, k - 1))
        for k in range(1, num_steps)
        for j in range(k, candidates - num_steps + k + 1)
    )


@pytest.mark.parametrize("width", [1, 3, None])
def test_the_calibration_costs_the_teacher_and_one_evaluation_a_kept_state(width):
    _, cost = made(recipe_of("vp", num_steps=4, num_fine=30, stride=4, width=width, num_samples=5))
    states = kept_states(4, 8, width or 10**9)
    assert cost["nfe"] == 5 * (30 + states)
    assert states <= 1 + 3 * (8 - 4 + 1) * (width or 10**9)


def test_labels_and_guidance_are_those_of_the_recipe():
    model = {"name": "gmm", "labels": True}
    recipe = recipe_of(model, guidance={"name": "cfg", "scale": 2.0}, num_steps=3, num_fine=24, stride=4)
    arrays, _ = made(recipe)
    runs = Runs(recipe, 64, num_fine=24)
    assert float(arrays["error"]) == pytest.approx(runs.error(arrays["times"]), rel=1e-9)


def test_its_key_names_the_number_of_steps_and_all_that_the_search_depends_on():
    recipe = recipe_of("vp", num_steps=4)
    key = recipe.calibrations[0].key
    for change in ({"num_steps": 7}, {"num_fine": 64}, {"stride": 8}, {"width": None}, {"num_samples": 7}):
        assert recipe.override({f"times.{k}": v for k, v in change.items()}).calibrations[0].key != key
    assert recipe.override({"nfe": 6}).calibrations[0].key != key  # six steps
    for change in ({"solver": "euler"}, {"batch_size": 32}):
        assert recipe.override(change).calibrations[0].key == key


def test_an_exported_grid_gives_its_rows_and_serves_no_other_number_of_steps(tmp_path):
    recipe = recipe_of("vp", num_steps=3, stride=16)
    arrays, _ = made(recipe)
    path = tmp_path / "grid.safetensors"
    calibration.save(path, recipe.calibrations[0].meta, arrays)
    given = recipe.override({"times.artifact": str(path)})
    np.testing.assert_array_equal(generate(given, 0, 8)["x0"], generate(recipe, 0, 8)["x0"])
    with pytest.raises(ValueError, match="is a grid of 3 steps, but num_steps is 4. Leave the artifact out"):
        generate(given.override({"times.num_steps": 4}), 0, 8)


@pytest.mark.parametrize(
    "fields",
    [{"num_steps": 0}, {"num_steps": 33}, {"stride": 0}, {"stride": 64, "num_steps": 3}, {"width": 0},
     {"num_samples": 0}, {"num_fine": 0}],
    ids=str,
)  # fmt: skip
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError, match="optimal_steps needs"):
        registry.times.build({"name": "optimal_steps"} | fields)
