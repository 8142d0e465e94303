"""Recipes: overrides, content keys and what is refused before any work starts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import tasks
from tasks import registry
from tasks.recipe import Recipe, canonical, digest, scorer_identity

DIGITS = Path(tasks.__file__).parent / "weights" / "digits"


def recipe(**changes):
    fields = {"model": "gmm", "solver": "ddim", "times": "uniform", "guidance": "none", "strategy": "single"}
    return Recipe(**fields | changes).completed()


# --- overrides -------------------------------------------------------------------------------------------------------


def test_a_dotted_path_sets_one_field():
    base = recipe()
    changed = base.override({"solver.eta": 0.5, "times.num_steps": 4, "seed": 7})
    assert changed.solver == {"name": "ddim", "eta": 0.5}
    assert changed.times == {"name": "uniform", "num_steps": 4}
    assert changed.seed == 7
    assert changed.model == base.model


def test_an_override_leaves_the_recipe_it_came_from_alone():
    base = recipe(model={"name": "gmm", "means": [[0.0], [1.0]]})
    before = canonical(dataclasses.asdict(base))
    base.override({"model.means.1.0": 5.0, "solver": "heun", "nfe": 7})
    assert canonical(dataclasses.asdict(base)) == before


def test_list_items_are_reached_by_number():
    base = recipe(times={"name": "explicit", "values": [1.0, 0.5, 0.0]})
    assert base.override({"times.values.1": 0.25}).times["values"] == [1.0, 0.25, 0.0]
    deep = recipe(model={"name": "gmm", "means": [[0.0, 1.0], [2.0, 3.0]]}).override({"model.means.1.0": 9})
    assert deep.model["means"] == [[0.0, 1.0], [9.0, 3.0]]


def test_fields_of_a_dictionary_are_reached_and_made():
    base = recipe(solver={"name": "diffusers", "config": {"solver_order": 3}}, times="stock")
    changed = base.override({"solver.config.solver_order": 1, "solver.config.timestep_spacing": "trailing"})
    assert changed.solver["config"] == {"solver_order": 1, "timestep_spacing": "trailing"}


def test_a_bare_name_takes_the_plugins_defaults():
    changed = recipe(solver={"name": "ddim", "eta": 0.5}).override({"solver": "heun"})
    assert changed.solver == registry.solvers.defaults("heun")
    assert changed.override({"solver": "ddim"}).solver == {"name": "ddim", "eta": 0.0}


def test_a_whole_spec_replaces_the_plugin():
    changed = recipe().override({"solver": {"name": "ddim", "eta": 0.25}})
    assert changed.solver == {"name": "ddim", "eta": 0.25}


def test_a_name_and_its_fields_may_come_together_in_any_order():
    for changes in ({"solver.eta": 1.0, "solver": "ddim"}, {"solver": "ddim", "solver.eta": 1.0}):
        assert recipe(solver="heun").override(changes).solver == {"name": "ddim", "eta": 1.0}


def test_another_grid_keeps_the_number_of_steps():
    base = recipe(times={"name": "uniform", "num_steps": 23})
    assert base.override({"times": "karras"}).times == {"name": "karras", "num_steps": 23, "rho": 7.0}
    assert base.override({"times": {"name": "karras", "rho": 3.0}}).times["num_steps"] == 23
    assert base.override({"times": {"name": "karras", "num_steps": 5}}).times["num_steps"] == 5
    assert base.override({"times": "karras", "times.num_steps": 6}).times["num_steps"] == 6
    four = base.override({"times": {"name": "explicit", "values": [1.0, 0.8, 0.6, 0.4, 0.0]}})
    assert four.override({"times": "uniform"}).times["num_steps"] == 4


def test_a_reward_can_be_set_and_unset():
    base = recipe(reward=None)
    assert base.override({"reward": "ink"}).reward == {"name": "ink"}
    assert base.override({"reward": "ink"}).override({"reward": None}).reward is None
    assert base.override({"reward": "ink"}).override({"reward": "null"}).reward is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solvr": "heun"}, "unknown override 'solvr', did you mean 'solver'"),
        ({"num_samples": 5}, "unknown override 'num_samples'"),
        ({"solver": "huen"}, "unknown solver 'huen', did you mean 'heun'"),
        ({"solver.etta": 0.5}, "unknown field of solver 'ddim': 'etta', did you mean 'eta'"),
        ({"solver.eta.x": 0.5}, "solver.eta.x goes below 0.0, which has no fields"),
        ({"seed.x": 1}, "seed.x goes below 0, which has no fields"),
        ({"reward.x": 1}, "reward.x cannot be set: there is no reward"),
        ({"times.values.7": 0.1}, "unknown field of times 'uniform'"),
        ({"solver.eta": 2.0}, "solver.eta must be between 0 and 1, got 2.0"),
        ({"solver.eta": "x"}, "solver.eta must be a float, got 'x'"),
        ({"nfe": 0}, "nfe must be a whole number of at least 1, got 0"),
        ({"nfe": 2.5}, "nfe must be a whole number of at least 1, got 2.5"),
        ({"nfe": True}, "nfe must be a whole number of at least 1, got True"),
        ({"nfe": "ten"}, "nfe must be a whole number of at least 1, got 'ten'"),
    ],
)
def test_overrides_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe().override(changes)


@pytest.mark.parametrize("item", ["3", "-1", "x"])
def test_a_list_item_that_does_not_exist_is_refused(item):
    base = recipe(times={"name": "explicit", "values": [1.0, 0.5, 0.0]})
    with pytest.raises(ValueError, match=f"times.values.{item} names item '{item}' of a list of 3"):
        base.override({f"times.values.{item}": 0.1})


@pytest.mark.parametrize("head", ["model", "solver", "times", "guidance", "strategy"])
@pytest.mark.parametrize("value", [None, 5])
def test_only_a_reward_may_be_missing(head, value):
    with pytest.raises(ValueError, match=head):
        recipe().override({head: value})


# --- nfe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 10, 11])
def test_nfe_is_spent_exactly(solver, nfe):
    assert recipe().override({"solver": solver, "nfe": nfe}).nfe == nfe


def test_heun_spends_an_odd_number_on_corrected_steps_and_an_even_one_with_one_euler_step():
    odd, even = recipe(solver="heun").override({"nfe": 7}), recipe(solver="heun").override({"nfe": 8})
    assert (odd.solver["leading_euler_steps"], odd.times["num_steps"]) == (0, 4)
    assert (even.solver["leading_euler_steps"], even.times["num_steps"]) == (1, 5)
    assert even.override({"nfe": 7}) == odd


def test_nfe_is_fitted_after_everything_else():
    changed = recipe().override({"nfe": 9, "times": "karras", "solver": "heun"})
    assert (changed.times["name"], changed.times["num_steps"], changed.nfe) == ("karras", 5, 9)


def test_nfe_must_agree_with_a_grid_of_fixed_length():
    base = recipe(times={"name": "explicit", "values": [1.0, 0.5, 0.0]})
    assert base.override({"nfe": 2}).times == base.times
    with pytest.raises(ValueError, match="nfe=3 needs 3 steps of ddim, but times explicit has 2"):
        base.override({"nfe": 3})


def test_nfe_counts_guidance_and_particles():
    base = recipe(model={"name": "gmm", "labels": True}, reward="ink").override({"nfe": 6})
    assert base.nfe == 6
    assert base.override({"guidance": "cfg"}).nfe == 12
    assert base.override({"guidance": "cfg", "strategy": "best_of_n", "strategy.n": 5}).nfe == 60


def test_a_stock_scheduler_that_cannot_spend_a_number_says_so():
    base = recipe(solver={"name": "diffusers", "scheduler": "HeunDiscreteScheduler"}, times="stock")
    assert base.override({"nfe": 7}).times["num_steps"] == 4
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot spend exactly 8 evaluations"):
        base.override({"nfe": 8})


# --- keys ------------------------------------------------------------------------------------------------------------


def test_json_round_trip_keeps_the_recipe_and_its_key():
    base = recipe(
        model={"name": "gmm", "means": [[0.0], [1.0]], "labels": True},
        guidance="cfg",
        strategy="best_of_n",
        reward="ink",
    )
    text = canonical(dataclasses.asdict(base))
    again = Recipe(**json.loads(text))
    assert again == base
    assert again.key == base.key
    assert canonical(dataclasses.asdict(again)) == text
    assert again.completed() == base


def test_canonical_text_does_not_depend_on_the_order_of_fields():
    assert (
        canonical({"b": 1, "a": [1, 2.5, None]})
        == canonical({"a": [1, 2.5, None], "b": 1})
        == '{"a":[1,2.5,null],"b":1}'
    )
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert len(digest({})) == 32


def test_what_is_not_a_number_has_no_canonical_text():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            canonical({"x": value})


def test_a_partial_spec_and_the_full_one_share_a_key():
    assert recipe(solver="ddim").key == recipe(solver={"name": "ddim", "eta": 0}).key


def test_equal_grids_by_different_names_share_a_key():
    uniform = recipe(times={"name": "uniform", "num_steps": 4})
    for times in (
        {"name": "explicit", "values": [1.0, 0.75, 0.5, 0.25, 0.0]},
        {"name": "quadratic", "num_steps": 4, "power": 1.0},
    ):
        assert recipe(times=times).key == uniform.key
    assert recipe(times={"name": "uniform", "num_steps": 5}).key != uniform.key
    assert recipe(times={"name": "quadratic", "num_steps": 4}).key != uniform.key


DETERMINING = [
    {"model.seed": 1},
    {"model.process": "flow"},
    {"solver": "euler"},
    {"solver.eta": 0.5},
    {"times.num_steps": 11},
    {"guidance.scale": 3.0},
    {"strategy": "single"},
    {"strategy.n": 3},
    {"reward": "class_log_prob"},
    {"labels": None},
    {"labels": 1},
    {"batch_size": 128},
    {"seed": 1},
    {"dtype": "float64"},
    {"device": "cuda"},
]


@pytest.mark.parametrize("changes", DETERMINING, ids=lambda c: "-".join(c))
def test_what_determines_the_rows_enters_the_key(changes):
    base = recipe(model={"name": "gmm", "labels": True}, guidance="cfg", strategy="best_of_n", reward="ink")
    assert base.override(changes).key != base.key


def test_keys_of_all_these_recipes_differ():
    base = recipe(model={"name": "gmm", "labels": True}, guidance="cfg", strategy="best_of_n", reward="ink")
    keys = [base.override(changes).key for changes in DETERMINING]
    assert len({base.key, *keys}) == len(DETERMINING) + 1


def test_a_reward_enters_the_key_only_when_the_strategy_looks_at_it():
    plain = recipe()
    assert plain.override({"reward": "ink"}).key == plain.key
    one = recipe(strategy={"name": "best_of_n", "n": 1})
    assert one.override({"reward": "ink"}).key == one.key
    many = recipe(model="digits", strategy="best_of_n", reward="ink")
    assert many.override({"reward": "class_log_prob"}).key != many.key


def test_labels_do_not_enter_the_key_of_a_model_without_classes():
    assert recipe().override({"labels": None}).key == recipe().key


def test_the_sample_count_is_no_part_of_a_recipe():
    assert "num_samples" not in {f.name for f in dataclasses.fields(Recipe)}


def test_a_checkpoint_enters_by_its_weights_and_not_by_its_path(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    shutil.copytree(DIGITS, first)
    shutil.copytree(DIGITS, second)
    base, one, two = (recipe(model={"name": "digits", "path": path}) for path in (None, str(first), str(second)))
    assert one.key == two.key == base.key
    unet = [recipe(model={"name": "unet", "path": str(path)}).key for path in (first, second)]
    assert unet[0] == unet[1]
    weights = second / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert recipe(model={"name": "digits", "path": str(second)}).key != base.key


def test_the_noise_schedule_of_a_checkpoint_enters_the_key(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "a")
    file = tmp_path / "a" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.012}))
    assert recipe(model={"name": "digits", "path": str(tmp_path / "a")}).key != recipe(model="digits").key


def test_a_stock_grid_enters_by_its_number_of_steps():
    base = recipe(solver={"name": "diffusers", "scheduler": "DDIMScheduler"}, times={"name": "stock", "num_steps": 5})
    assert base.override({"times.num_steps": 6}).key != base.key
    assert base.override({"solver.config.timestep_spacing": "trailing"}).key != base.key


def test_column_keys_follow_the_rows_the_scorer_and_its_weights(monkeypatch):
    base = recipe(model="digits")
    ink, accuracy = {"name": "ink"}, {"name": "class_correct"}
    assert (
        len({base.key, base.column_key(ink), base.column_key(accuracy), base.override({"seed": 1}).column_key(ink)})
        == 4
    )
    before = base.column_key(accuracy)
    monkeypatch.setattr("tasks.classifier.revision", lambda: "retrained")
    assert base.column_key(accuracy) != before
    assert scorer_identity(accuracy)["revision"] == "retrained"


def test_a_retrained_reward_model_changes_the_rows_it_selected(monkeypatch):
    fields = {"model": "digits", "strategy": "best_of_n", "reward": "class_log_prob"}
    before = recipe(**fields).key
    monkeypatch.setattr("tasks.classifier.revision", lambda: "retrained")
    assert recipe(**fields).key != before


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_cycle_stay_or_are_absent():
    labelled = recipe(model={"name": "gmm", "labels": True})
    assert [labelled.label(i) for i in range(5)] == [0, 1, 2, 0, 1]
    assert [labelled.override({"labels": 2}).label(i) for i in range(3)] == [2, 2, 2]
    none = labelled.override({"labels": None})
    assert [none.label(i) for i in range(3)] == [3, 3, 3]
    assert labelled.has_labels
    assert not none.has_labels
    assert not recipe().has_labels


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "token solver, image model": (
        {"model": "digits", "solver": "ancestral"},
        "solver ancestral steps masked processes",
    ),
    "image solver, token model": ({"model": "table"}, "model table is masked. Choose one of: ancestral"),
    "stock grid, own solver": (
        {"times": "stock"},
        "times=stock is a stock scheduler's own grid, but the solver is ddim",
    ),
    "noise-level grid, token model": ({"model": "table", "solver": "ancestral", "times": "karras"}, "times"),
    "log-SNR grid, token model": ({"model": "table", "solver": "ancestral", "times": "logsnr"}, "times"),
    "stock grid, token model": ({"model": "table", "solver": "ancestral", "times": "stock"}, "times=stock"),
    "guidance, model without classes": ({"guidance": "cfg"}, "guidance cfg needs labels, but model gmm has none"),
    "guidance, no labels": (
        {"model": {"name": "gmm", "labels": True}, "guidance": "cfg", "labels": None},
        "guidance cfg needs labels, but labels is null",
    ),
    "choice without a reward": ({"strategy": "best_of_n"}, "strategy best_of_n needs a reward. Set reward=NAME"),
    "image reward, vector model": (
        {"strategy": "best_of_n", "reward": "class_log_prob", "model": {"name": "gmm", "labels": True}},
        r"class_log_prob reads 8x8 grey images \(1, 8, 8\), but the model makes \(2,\)",
    ),
    "class reward, no labels": (
        {"model": "digits", "strategy": "best_of_n", "reward": "class_correct", "labels": None},
        "reward class_correct needs labels, but this study has none",
    ),
    "times that meet": (
        {"times": {"name": "quadratic", "num_steps": 10, "power": 2000.0}},
        "times must decrease",
    ),
    "explicit times, class that takes none": (
        {"solver": {"name": "diffusers", "scheduler": "DDIMScheduler"}},
        "DDIMScheduler takes no explicit times. Use times=stock",
    ),
    "unknown scheduler": (
        {"solver": {"name": "diffusers", "scheduler": "DIMScheduler"}, "times": "stock"},
        "unknown diffusers scheduler 'DIMScheduler', did you mean 'DDIMScheduler'",
    ),
    "not a scheduler": (
        {"solver": {"name": "diffusers", "scheduler": "UNet2DModel"}, "times": "stock"},
        "unknown diffusers scheduler 'UNet2DModel'",
    ),
    "unknown scheduler option": (
        {
            "solver": {"name": "diffusers", "scheduler": "DDIMScheduler", "config": {"spacing": "leading"}},
            "times": "stock",
        },
        "unknown field of DDIMScheduler: 'spacing', did you mean 'timestep_spacing'",
    ),
    "flow scheduler, curved model": (
        {"solver": {"name": "diffusers", "scheduler": "FlowMatchEulerDiscreteScheduler"}, "times": "stock"},
        "FlowMatchEulerDiscreteScheduler has no beta schedule",
    ),
    "curved scheduler, flow model": (
        {
            "model": {"name": "gmm", "process": "flow"},
            "solver": {"name": "diffusers", "scheduler": "DDIMScheduler"},
            "times": "stock",
        },
        "DDIMScheduler has no use_flow_sigmas",
    ),
    "curved scheduler, EDM model": (
        {
            "model": {"name": "gmm", "process": "edm"},
            "solver": {"name": "diffusers", "scheduler": "DDIMScheduler"},
            "times": "stock",
        },
        "DDIMScheduler does not fit an EDM model",
    ),
    "inverse scheduler": (
        {"solver": {"name": "diffusers", "scheduler": "DDIMInverseScheduler"}, "times": "stock"},
        "DDIMInverseScheduler",
    ),
    "label out of range": ({"model": "digits", "labels": 10}, "labels must be below the model's 10 classes, got 10"),
    "negative label": ({"model": "digits", "labels": -1}, "labels must be below"),
    "label of no kind": (
        {"model": "digits", "labels": "random"},
        "labels must be cycle, null or a number, got 'random'",
    ),
    "label that is a truth value": ({"model": "digits", "labels": True}, "labels must be cycle, null or a number"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "half a batch": ({"batch_size": 16.5}, "batch_size must be .*16.5"),
    "batch in words": ({"batch_size": "many"}, "batch_size must be .*'many'"),
    "negative seed": ({"seed": -1}, "seed must be between 0 and 2"),
    "large seed": ({"seed": 2**63}, "seed must be between 0 and 2"),
    "half a seed": ({"seed": 0.5}, "seed must be .*0.5"),
    "unknown dtype": ({"dtype": "float16"}, "dtype must be float32 or float64, got 'float16'"),
    "unknown device": ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_impossible_pairings_are_refused_when_planning(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes).check()


@pytest.mark.parametrize("values", [[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [1.0, 0.2, 0.6, 0.0]])
def test_times_that_do_not_decrease_are_refused(values):
    with pytest.raises(ValueError, match="strictly decreasing"):
        recipe().override({"times": {"name": "explicit", "values": values}})


POSSIBLE = [
    {},
    {"model": "digits", "guidance": "cfg", "strategy": "best_of_n", "reward": "class_log_prob", "solver": "heun"},
    {"model": "digits_flow", "solver": "dpmpp_2m", "labels": 3},
    {"model": "table", "solver": "ancestral"},
    {"model": "table", "solver": "ancestral", "strategy": "best_of_n", "reward": "ink", "times": "quadratic"},
    {"solver": "diffusers", "times": "stock"},
    {"strategy": {"name": "best_of_n", "n": 1}},
    {"times": {"name": "explicit", "values": [0.9, 0.5, 0.1]}},
]


@pytest.mark.parametrize("changes", POSSIBLE, ids=range(len(POSSIBLE)))
def test_possible_pairings_pass(changes):
    recipe(**changes).check()
