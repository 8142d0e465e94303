"""Artifacts: what their keys are made of, how they are kept, and which are refused."""

import numpy as np
import pytest
import torch

from tasks import calibration, registry
from tasks.calibration import FIRST_INDEX, Bench
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedModel

LABELLED = {"name": "gmm", "labels": True}
SMALL = {"name": "dp_steps", "num_steps": 4, "num_fine": 12, "num_samples": 8}


def recipe_of(model="gmm", times=SMALL, solver="ddim", initial="prior", **fields):
    fields = {"guidance": "none", "batch_size": 16} | fields
    guidance = fields.pop("guidance")
    return Recipe(model, solver, times, guidance, "single", initial=initial, **fields).completed()


def made(recipe):
    """What ``make`` gives for the recipe's only calibration."""
    (needed,) = recipe.calibrations
    return calibration.make(recipe, needed, recipe.parts)


@pytest.fixture
def fresh(monkeypatch):
    """No artifacts in memory, and a list of the places that are calibrated from here on."""
    calls, original = [], calibration.make

    def counted(recipe, needed, parts):
        calls.append(needed.place)
        return original(recipe, needed, parts)

    monkeypatch.setattr(calibration, "make", counted)
    monkeypatch.setattr(calibration, "_MADE", type(calibration._MADE)())
    return calls


@pytest.fixture
def kept(tmp_path):
    """A recipe, its artifact, and the file that it was exported to."""
    recipe = recipe_of()
    arrays, _ = made(recipe)
    path = tmp_path / "grid.safetensors"
    calibration.save(path, recipe.calibrations[0].meta, arrays)
    return recipe, arrays, path


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"guidance.scale": 3.0}, {"times.num_fine": 13}, {"times.num_samples": 9}, {"model.ridge": 0.5},
     {"initial": "teleport"}, {"labels": None, "guidance": "none"}, {"seed": 5}, {"dtype": "float64"},
     {"times": "gits"}],
    ids=str,
)  # fmt: skip
def test_what_an_artifact_depends_on_is_in_its_key(change):
    recipe = recipe_of(LABELLED, guidance={"name": "cfg", "scale": 2.0})
    other = recipe.override(change)
    assert other.calibrations[0].key != recipe.calibrations[0].key
    assert other.key != recipe.key


@pytest.mark.parametrize(
    "change", [{"times.num_steps": 9}, {"nfe": 7}, {"solver": "heun"}, {"batch_size": 32}], ids=str
)
def test_what_it_does_not_depend_on_is_not(change):
    recipe = recipe_of(LABELLED, guidance={"name": "cfg", "scale": 2.0})
    assert recipe.override(change).calibrations[0].key == recipe.calibrations[0].key
    assert recipe.override(change).key != recipe.key


def test_a_model_of_another_revision_needs_another_artifact(monkeypatch):
    key = recipe_of().calibrations[0].key
    monkeypatch.setattr(type(registry.models.build("gmm")), "revision", "other")
    assert recipe_of().calibrations[0].key != key
    assert recipe_of().calibrations[0].meta["revision"] == "other"


def test_a_new_version_of_a_method_needs_another_artifact(monkeypatch):
    key = recipe_of().calibrations[0].key
    monkeypatch.setattr(type(recipe_of().parts.times), "calibration_revision", "2")
    assert recipe_of().calibrations[0].key != key


def test_a_recipe_without_such_plug_ins_needs_nothing():
    recipe = recipe_of(times={"name": "uniform", "num_steps": 4})
    assert recipe.calibrations == () and calibration.make_all(recipe) == {}
    assert calibration.bound(recipe, {}) is recipe.parts


def test_calibrations_come_in_the_order_in_which_they_rely_on_each_other():
    hooks = [{"name": "compensation", "num_samples": 2, "num_held_out": 2, "num_reference": 8}]
    solver = {"name": "unified", "preset": "unipc", "hooks": hooks}
    recipe = recipe_of(times=SMALL, solver=solver, initial={"name": "teleport", "rho": 20.0})
    recipe.check()
    assert [c.place for c in recipe.calibrations] == ["times", "initial", "solver.hooks.0"]
    assert len({c.key for c in recipe.calibrations}) == 3
    rows = generate(recipe, 0, 8)
    assert np.isfinite(rows["x0"]).all() and (rows["nfe"] == recipe.nfe).all()


@pytest.mark.parametrize("name", ["teleport", "dmcmc", "dpm_ot", "shared_noise"])
@pytest.mark.parametrize("times", ["dp_steps", "gits", "ays", "optimal_steps"])
def test_every_calibrated_initial_state_goes_with_every_calibrated_grid(name, times):
    initial = {"name": name}
    if name == "dpm_ot":
        initial |= {"num_targets": 16, "num_draws": 512, "num_iterations": 20}
    if name == "shared_noise":
        initial |= {"num_candidates": 2, "num_references": 2}
    recipe = recipe_of(times={"name": times, "num_steps": 4, "num_samples": 8}, initial=initial)
    recipe.check()
    rows = generate(recipe, 0, 16)
    assert np.isfinite(rows["x0"]).all() and (rows["nfe"] == recipe.nfe).all()


# --- in memory -------------------------------------------------------------------------------------------------------


def test_an_artifact_is_made_once_for_all_recipes_that_share_it(fresh):
    recipe = recipe_of()
    first, again = calibration.make_all(recipe), calibration.make_all(recipe)
    other = calibration.make_all(recipe.override({"times.num_steps": 7}))
    assert fresh == ["times"]
    assert list(first) == list(again) == list(other) == [recipe.calibrations[0].key]
    calibration.make_all(recipe.override({"times.num_fine": 13}))
    assert fresh == ["times", "times"]


def test_making_an_artifact_again_gives_the_same_bits():
    for recipe in (
        recipe_of(),
        recipe_of(solver={"name": "dpm_solver_v3", "num_levels": 8, "num_data": 16}, times="uniform"),
    ):
        (a, _), (b, _) = made(recipe), made(recipe)
        assert all(np.array_equal(a[name], b[name]) for name in a) and set(a) == set(b)


def test_rows_do_not_depend_on_where_the_artifact_came_from(fresh):
    recipe = recipe_of()
    arrays, _ = made(recipe)
    given = generate(recipe, 0, 16, artifacts={recipe.calibrations[0].key: arrays})
    np.testing.assert_array_equal(given["x0"], generate(recipe, 0, 16)["x0"])


def test_what_it_costs_is_counted_and_is_no_part_of_the_rows():
    recipe = recipe_of(LABELLED, guidance={"name": "cfg", "scale": 2.0})
    _, cost = made(recipe)
    assert cost["nfe"] == 12 * 8 * 2 and cost["generate_s"] > 0
    assert (generate(recipe, 0, 4)["nfe"] == 4 * 2).all()


def test_an_answer_that_is_not_finite_is_refused():
    recipe = recipe_of({"name": "gmm", "means": [[1e39, 0.0]], "covariances": [1.0]})
    with pytest.raises(ValueError, match="the calibration of times gave .* that is not finite"):
        made(recipe)


def test_calibrations_use_rows_of_their_own():
    recipe = recipe_of(LABELLED)
    counted = CountedModel(recipe.parts.model.load("cpu"), 16)
    bench = Bench(recipe, recipe.parts, counted, counted)
    noise = bench.noise(4, first=2)
    assert noise.indices.tolist() == [FIRST_INDEX + 2 + i for i in range(4)] and FIRST_INDEX + 2**29 < 2**32
    assert bench.labels(5).tolist() == [0, 1, 2, 0, 1]
    x0, labels = bench.data(7)
    assert x0.shape == (7, 2) and x0.dtype == torch.float32 and labels.shape == (7,)
    with pytest.raises(ValueError, match="has no reference data"):
        Bench(recipe, type("P", (), {"model": type("M", (), {"name": "other"})()})(), counted, counted).data(3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_artifact_file_gives_the_same_rows_and_calibrates_nothing(kept, fresh):
    recipe, arrays, path = kept
    filed = recipe.override({"times.artifact": str(path)})
    filed.check()
    (needed,) = filed.calibrations
    assert needed.key.startswith("file:") and needed.meta == recipe.calibrations[0].meta
    read = calibration.make_all(filed)[needed.key]
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
    rows = generate(filed, 0, 16)["x0"]
    assert fresh == []
    np.testing.assert_array_equal(rows, generate(recipe, 0, 16)["x0"])
    np.testing.assert_array_equal(rows, generate(filed, 0, 16, artifacts={})["x0"])


def test_a_file_may_be_made_for_other_fields_that_it_replaces(kept):
    recipe, _, path = kept
    recipe.override({"times.artifact": str(path), "times.num_steps": 6, "times.num_fine": 50}).check()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"times": {"name": "gits", "num_steps": 4}}, "plugin"), ({"model": {"name": "gmm", "dim": 3}}, "model"),
     ({"model": LABELLED, "guidance": "cfg"}, "model|guidance")],
)  # fmt: skip
def test_a_file_made_for_something_else_is_refused_before_any_work(kept, change, word):
    recipe, _, path = kept
    other = recipe.override(change).override({"times.artifact": str(path)})
    with pytest.raises(ValueError, match=f"was made for ({word}) .*, but this recipe has .* Leave the artifact out"):
        other.check()


def test_a_file_made_under_other_guidance_is_refused(tmp_path):
    recipe = recipe_of(LABELLED, guidance={"name": "cfg", "scale": 2.0})
    path = tmp_path / "grid.safetensors"
    calibration.save(path, recipe.calibrations[0].meta, made(recipe)[0])
    recipe.override({"times.artifact": str(path)}).check()
    with pytest.raises(ValueError, match="was made for guidance"):
        recipe.override({"times.artifact": str(path), "guidance.scale": 3.0}).check()


def test_a_file_made_for_other_weights_is_refused(kept, monkeypatch):
    recipe, _, path = kept
    filed = recipe.override({"times.artifact": str(path)})
    monkeypatch.setattr(type(registry.models.build("gmm")), "revision", "other")
    with pytest.raises(ValueError, match="was made for revision 'exact', but this recipe has 'other'"):
        filed.check()


def test_a_file_that_is_missing_damaged_or_something_else_is_refused(kept, tmp_path):
    recipe, _, path = kept
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    text = tmp_path / "text.safetensors"
    text.write_text("not an artifact")
    other = tmp_path / "other.safetensors"
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, other)
    for place, message in ((tmp_path / "none", "does not exist"), (cut, "cannot be read"), (text, "cannot be read"),
                           (other, "is no Solvus artifact")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipe.override({"times.artifact": str(place)}).check()


def test_another_file_is_another_key(kept, tmp_path):
    recipe, arrays, path = kept
    other = tmp_path / "other.safetensors"
    calibration.save(other, recipe.calibrations[0].meta, arrays | {"costs": 2 * np.abs(arrays["costs"])})
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    a, b, c = (recipe.override({"times.artifact": str(p)}).calibrations[0].key for p in (path, other, copy))
    assert a != b and a == c


@pytest.mark.parametrize("later", ["compensation", "dpm_solver_v3"])
def test_a_file_for_the_times_serves_the_calibrations_that_come_after(kept, later):
    recipe, _, path = kept
    solver = {"name": "dpm_solver_v3", "num_levels": 8, "num_data": 16}
    if later == "compensation":
        hooks = [{"name": later, "num_samples": 2, "num_held_out": 2, "num_reference": 8}]
        solver = {"name": "unified", "preset": "unipc", "hooks": hooks}
    both = recipe.override({"times.artifact": str(path), "solver": solver})
    both.check()
    assert np.isfinite(generate(both, 0, 8)["x0"]).all()


@pytest.mark.parametrize(
    "place",
    [("times", n) for n in registry.times.names()] + [("initial", n) for n in registry.initials.names()]
    + [("solver", n) for n in registry.solvers.names()] + [("hook", n) for n in registry.hooks.names()],
    ids=str,
)  # fmt: skip
def test_every_plug_in_that_calibrates_says_what_on(place):
    kind, name = place
    cls = registry.ALL[kind].get(name)
    if not hasattr(cls, "calibrate"):
        return
    plugin = registry.ALL[kind].build(name)
    assert plugin.artifact == "" and isinstance(plugin.calibration_revision, str)
    assert set(plugin.calibrated_on) <= set(Recipe.__dataclass_fields__)
    assert "artifact" not in plugin.calibration_fields()
    # One artifact serves every number of steps, except where the dynamic program ends at its own.
    assert ("num_steps" in plugin.calibration_fields()) == (name == "optimal_steps")
