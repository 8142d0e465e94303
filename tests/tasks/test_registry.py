"""Conformance of every registered plug-in, and the registry's own errors."""

import dataclasses
import json
import pickle
import re
import tempfile
import types
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import tiny_bert
import tiny_edm
import tiny_weights
import torch

import tasks
from tasks import registry
from tasks.recipe import canonical
from tests.tasks import tiny_pipelines

DIGITS = str(Path(tasks.__file__).parent / "weights" / "digits")
PIPELINE = str(tiny_pipelines.digits(Path(tempfile.mkdtemp(prefix="solvus-")) / "digits"))
EDM = str(tiny_edm.converted(Path(tempfile.mkdtemp(prefix="solvus-"))))
REQUIRED = {("model", name): {"path": path} for name, path in (("unet", DIGITS), ("diffusers", PIPELINE), ("edm", EDM))}
EVERY = [(kind, name) for kind, known in registry.ALL.items() for name in known.names()]
EVERY_PLUGIN = pytest.mark.parametrize(("kind", "name"), EVERY, ids=[f"{kind}-{name}" for kind, name in EVERY])

# Specs with fields away from their defaults.
UNUSUAL = [
    (
        "model",
        {"name": "gmm", "dim": 3, "num_components": 2, "seed": 4, "process": "edm", "ridge": 0.5, "labels": True},
    ),
    ("model", {"name": "gmm", "means": [[0.0, 1.0], [2.0, 3.0]], "covariances": [0.5, 2.0], "weights": [1.0, 3.0]}),
    ("model", {"name": "gmm", "means": [[0.0, 1.0]], "covariances": [[[2.0, 0.5], [0.5, 1.0]]], "process": "flow"}),
    ("model", {"name": "gmm", "fit": "digits"}),
    ("model", {"name": "table", "vocabulary": 2, "length": 2, "probabilities": [0.5, 0.0, 0.25, 0.25]}),
    ("model", {"name": "digits", "path": DIGITS}),
    ("model", {"name": "digits_tokens", "path": str(Path(DIGITS).with_name("digits_tokens"))}),
    ("model", {"name": "masked_lm", "path": "owner/name", "revision": "0123456789" * 4, "length": 7}),
    ("model", {"name": "unet", "path": DIGITS, "scheduler": {"beta_schedule": "linear"}, "data": "digits"}),
    ("model", {"name": "diffusers", "path": PIPELINE, "dtype": "bfloat16", "compile": True, "halvings": 0}),
    ("model", {"name": "edm", "path": EDM, "sigma_min": 0.01, "sigma_max": 50.0}),
    ("times", {"name": "shifted", "num_steps": 3, "shift": 1.5}),
    ("solver", {"name": "ddim", "eta": 0.25}),
    ("solver", {"name": "dpmpp_2m", "lower_order_final": True}),
    ("solver", {"name": "heun", "leading_euler_steps": 2}),
    ("solver", {"name": "diffusers", "scheduler": "DDIMScheduler", "config": {"timestep_spacing": "trailing"}}),
    ("times", {"name": "explicit", "values": [1.0, 0.125, 0.0]}),
    ("times", {"name": "karras", "num_steps": 3, "rho": 5.5}),
    ("times", {"name": "quadratic", "num_steps": 3, "power": 1.5}),
    ("times", {"name": "ratios", "ratios": [0.5]}),
    ("guidance", {"name": "cfg", "scale": 3.0}),
    ("strategy", {"name": "best_of_n", "n": 7, "budget": {"nfe": 100}}),
    ("strategy", {"name": "pruned_best_of_n", "checks": [0.1, 0.2, 0.9], "factor": 1.5}),
    ("strategy", {"name": "best_of_majority", "equivalence": "cell", "cell": 0.5}),
    ("strategy", {"name": "noise_search", "method": "vp", "growth": 2.0, "budget": {"reward_calls": 9}}),
    ("strategy", {"name": "beam", "widths": [4, 2], "branching": [3, 1], "per_parent": 1}),
    ("strategy", {"name": "repulsion", "pick": 2, "features": "classifier"}),
    ("strategy", {"name": "token_repulsion", "pick": 2, "features": "places"}),
    (
        "reward",
        {"name": "weighted", "rewards": [{"name": "ink"}, {"name": "linear", "slope": 2.0}], "weights": [1.0, -1.0]},
    ),
    ("metric", {"name": "frechet", "features": "identity"}),
    ("metric", {"name": "kid", "features": "identity", "max_samples": 12}),
    ("metric", {"name": "mean_reward", "reward": "ink"}),
    ("metric", {"name": "perplexity", "model": {"name": "table", "vocabulary": 2}}),
    ("metric", {"name": "distinct_n", "n": 3}),
    ("metric", {"name": "pass_at_k", "reward": "class_correct", "k": 2}),
    ("reward", {"name": "token_log_prob", "model": {"name": "table"}}),
    ("metric", {"name": "trajectory", "solver": {"name": "heun"}, "num_steps": 9, "times": {"name": "karras"}}),
    ("features", {"name": "trajectory_distance", "num_steps": 9, "times": {"name": "explicit", "values": [1.0, 0.0]}}),
]


@lru_cache(maxsize=1)
def saved_bert():
    folder = tempfile.TemporaryDirectory()
    tiny_bert.save(folder.name)
    return folder


def build(kind, name):
    if name == "masked_lm":
        return registry.models.build({"name": name, "path": saved_bert().name, "length": 6})
    return registry.ALL[kind].build({"name": name} | REQUIRED.get((kind, name), {}) | tiny_weights.fields(kind, name))


# --- every plug-in ---------------------------------------------------------------------------------------------------


@EVERY_PLUGIN
def test_spec_to_json_to_object_to_spec_is_the_identity(kind, name):
    plugin = build(kind, name)
    spec = registry.ALL[kind].describe(plugin)
    again = registry.ALL[kind].build(json.loads(canonical(spec)))
    assert again == plugin
    assert registry.ALL[kind].describe(again) == spec
    assert set(spec) == {"name"} | {f.name for f in dataclasses.fields(plugin)}


@pytest.mark.parametrize(("kind", "spec"), UNUSUAL, ids=[f"{kind}-{spec['name']}" for kind, spec in UNUSUAL])
def test_fields_survive_the_round_trip(kind, spec):
    full = registry.ALL[kind].complete(spec)
    assert full | spec == full
    again = registry.ALL[kind].build(json.loads(canonical(full)))
    assert registry.ALL[kind].describe(again) == full
    assert again == registry.ALL[kind].build(spec)


@EVERY_PLUGIN
def test_plugin_pickles(kind, name):
    plugin = build(kind, name)
    again = pickle.loads(pickle.dumps(plugin))
    assert again == plugin
    assert registry.ALL[kind].describe(again) == registry.ALL[kind].describe(plugin)


@EVERY_PLUGIN
def test_plugin_is_a_frozen_dataclass_known_by_its_name(kind, name):
    cls = registry.ALL[kind].get(name)
    assert cls.name == name
    assert cls.__dataclass_params__.frozen
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


@EVERY_PLUGIN
def test_plugin_says_what_it_is_and_where_it_comes_from(kind, name):
    cls = registry.ALL[kind].get(name)
    first = cls.__doc__.strip().splitlines()[0]
    assert len(first) <= 120
    assert re.search(r"[.:,)]$", first), "the first line is a sentence, or the part of one that fits"
    assert re.search(r"^\s*Reference: \S", cls.__doc__, re.MULTILINE)
    for f in dataclasses.fields(cls):
        assert re.search(rf"^\s*{f.name}: \S", cls.__doc__, re.MULTILINE), f"field {f.name} is not documented"


@EVERY_PLUGIN
def test_plugin_has_its_own_file(kind, name):
    cls = registry.ALL[kind].get(name)
    others = [n for n in registry.ALL[kind].names() if registry.ALL[kind].get(n).__module__ == cls.__module__]
    assert others == [name]


@EVERY_PLUGIN
def test_plugin_refuses_a_field_it_does_not_have(kind, name):
    with pytest.raises(ValueError, match=f"unknown field of {kind} {name!r}: 'no_such_field'"):
        registry.ALL[kind].build({"name": name, "no_such_field": 1})


MEMBERS = {
    "model": ("noising", "shape", "num_classes", "kind", "revision", "reference", "load"),
    "solver": ("process", "order", "stochastic", "step", "nfe", "fit"),
    "times": ("num_steps", "__call__"),
    "hook": ("begin",),
    "filter": ("truncates", "__call__"),
    "initial": ("evaluations", "start", "__call__"),
    "guidance": ("evaluations", "needs_labels", "wrap"),
    "strategy": ("particles", "uses_reward", "branches", "__call__"),
    "reward": ("needs_labels", "revision", "check", "__call__"),
    "features": ("needs_labels", "revision", "check", "dim", "__call__"),
    "metric": ("better", "needs", "check", "reference", "summarize", "merge", "compute", "influence"),
}


@EVERY_PLUGIN
def test_plugin_has_the_members_of_its_protocol(kind, name):
    plugin = build(kind, name)
    missing = [member for member in MEMBERS[kind] if not hasattr(plugin, member)]
    assert not missing


@EVERY_PLUGIN
def test_public_members_are_documented(kind, name):
    cls = registry.ALL[kind].get(name)
    callables = (types.FunctionType, property)
    for attribute, value in vars(cls).items():
        generated = attribute in ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__")
        public = not attribute.startswith("_") or attribute == "__call__"
        if isinstance(value, callables) and public and not generated:
            assert value.__doc__, f"{cls.__name__}.{attribute}"


@pytest.mark.parametrize("name", registry.rewards.names())
def test_a_reward_gives_one_number_per_sample(name):
    samples = torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8)
    reward = build("reward", name)
    scorer = reward.at(torch.arange(5)) if hasattr(reward, "at") else reward
    values = scorer(samples, torch.arange(5))
    assert values.shape == (5,)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n.startswith("inception") else n for n in registry.features.names()],
)
def test_features_are_as_long_as_they_say(name):
    extractor = build("features", name)
    companion = [torch.zeros(5, 1, 8, 8)] if hasattr(extractor, "companion") else []
    values = extractor(torch.linspace(-1, 1, 5 * 64).view(5, 1, 8, 8), None, *companion)
    assert values.shape == (5, extractor.dim((1, 8, 8)))


def test_rewards_and_features_do_not_share_names():
    assert not set(registry.rewards.names()) & set(registry.features.names())


@pytest.mark.parametrize("name", ["class_correct", "class_log_prob", "classifier"])
def test_the_digit_classifier_refuses_other_shapes(name):
    plugin = registry.scorer({"name": name})
    plugin.check((1, 8, 8))
    with pytest.raises(ValueError, match=rf"{name} reads 8x8 grey images \(1, 8, 8\), but the model makes \(2,\)"):
        plugin.check((2,))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "typo", "nearest"),
    [
        ("solver", "huen", "heun"),
        ("solver", "dpm_2m", "dpmpp_2m"),
        ("times", "karas", "karras"),
        ("model", "digit", "digits"),
        ("metric", "frechett", "frechet"),
        ("strategy", "best_of_m", "best_of_n"),
    ],
)
def test_an_unknown_name_offers_the_nearest(kind, typo, nearest):
    with pytest.raises(ValueError, match=f"unknown {kind} '{typo}', did you mean '{nearest}'") as caught:
        registry.ALL[kind].build(typo)
    assert all(name in str(caught.value) for name in registry.ALL[kind].names())


def test_a_name_like_no_other_only_lists_the_registered():
    with pytest.raises(ValueError, match="unknown solver 'qqqq'. Registered: ancestral, ") as caught:
        registry.solvers.get("qqqq")
    assert "did you mean" not in str(caught.value)


def test_an_unknown_field_offers_the_nearest():
    with pytest.raises(ValueError, match="unknown field of solver 'ddim': 'etta', did you mean 'eta'") as caught:
        registry.solvers.build({"name": "ddim", "etta": 1.0})
    assert str(caught.value).endswith("Fields: eta")


def test_a_spec_needs_a_name():
    with pytest.raises(ValueError, match=r"a solver needs a name, got \{'eta': 1\}"):
        registry.solvers.build({"eta": 1})


@pytest.mark.parametrize("spec", [None, 5, ["ddim"], 1.5, True])
def test_what_is_no_spec_is_refused_with_the_value(spec):
    with pytest.raises(ValueError, match="solver") as caught:
        registry.solvers.build(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("name", [None, 5, ["ddim"]])
def test_what_is_no_name_is_refused_with_the_value(name):
    with pytest.raises(ValueError, match="solver") as caught:
        registry.solvers.build({"name": name})
    assert repr(name) in str(caught.value)


def test_a_field_without_a_default_must_be_given():
    with pytest.raises(ValueError, match=r"model 'unet' needs model.path \(an? str\)"):
        registry.models.build("unet")
    for name in ("unet", "diffusers", "edm", "masked_lm"):  # not on the command line, or nothing after the "="
        for path in (None, ""):
            with pytest.raises(
                ValueError, match=rf"model '{name}' needs model.path .a str.. Set model.path=VALUE; `solv"
            ):
                registry.models.build({"name": name, "path": path})


WRONG = [
    ("solver", {"name": "ddim", "eta": "much"}, "solver.eta", "float", "'much'"),
    ("solver", {"name": "ddim", "eta": True}, "solver.eta", "float", "True"),
    ("solver", {"name": "ddim", "eta": None}, "solver.eta", "float", "None"),
    ("solver", {"name": "ddim", "eta": [0.5]}, "solver.eta", "float", r"\[0.5\]"),
    ("solver", {"name": "heun", "leading_euler_steps": 1.5}, "solver.leading_euler_steps", "int", "1.5"),
    ("solver", {"name": "dpmpp_2m", "lower_order_final": 1}, "solver.lower_order_final", "bool", "1"),
    ("solver", {"name": "diffusers", "scheduler": 3}, "solver.scheduler", "str", "3"),
    ("solver", {"name": "diffusers", "config": "leading"}, "solver.config", "dict", "'leading'"),
    ("times", {"name": "uniform", "num_steps": "10"}, "times.num_steps", "int", "'10'"),
    ("times", {"name": "uniform", "num_steps": True}, "times.num_steps", "int", "True"),
    ("times", {"name": "uniform", "num_steps": float("inf")}, "times.num_steps", "int", "inf"),
    ("times", {"name": "uniform", "num_steps": float("nan")}, "times.num_steps", "int", "nan"),
    ("times", {"name": "explicit", "values": 0.5}, "times.values", "list of float", "0.5"),
    ("times", {"name": "explicit", "values": [1.0, "x"]}, "times.values.1", "float", "'x'"),
    ("model", {"name": "gmm", "labels": "yes"}, "model.labels", "bool", "'yes'"),
    ("model", {"name": "gmm", "weights": "x"}, "model.weights", "list of float or null", "'x'"),
    ("model", {"name": "digits", "path": 3}, "model.path", "str or null", "3"),
]


@pytest.mark.parametrize(("kind", "spec", "path", "allowed", "value"), WRONG, ids=[f"{w[2]}={w[4]}" for w in WRONG])
def test_a_wrong_type_names_path_value_and_what_is_allowed(kind, spec, path, allowed, value):
    with pytest.raises(ValueError, match=rf"^{path} must be an? {allowed}, got {value} "):
        registry.ALL[kind].build(spec)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("solver", {"name": "ddim", "eta": float("nan")}),
        ("guidance", {"name": "cfg", "scale": float("nan")}),
        ("guidance", {"name": "cfg", "scale": float("inf")}),
        ("times", {"name": "karras", "rho": float("nan")}),
        ("times", {"name": "quadratic", "power": float("inf")}),
        ("times", {"name": "explicit", "values": [1.0, float("nan"), 0.0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value['name']}",
)
def test_a_number_that_is_not_finite_is_refused_with_its_path(kind, spec):
    with pytest.raises(ValueError, match=rf"{kind}.* must be a finite float, got (nan|inf)"):
        registry.ALL[kind].build(spec)


def test_whole_floats_are_integers_and_integers_are_floats():
    assert registry.times.build({"name": "uniform", "num_steps": 4.0}) == registry.times.build(
        {"name": "uniform", "num_steps": 4}
    )
    eta = registry.solvers.build({"name": "ddim", "eta": 1}).eta
    assert isinstance(eta, float)


def test_building_does_not_change_the_spec():
    spec = {"name": "diffusers", "config": {"solver_order": 3}}
    before = json.dumps(spec)
    plugin = registry.solvers.build(spec)
    assert json.dumps(spec) == before
    described = registry.solvers.describe(plugin)
    described["config"]["solver_order"] = 1
    assert plugin.config == {"solver_order": 3}


def test_a_registry_that_two_threads_ask_first_is_whole_for_both(tmp_path, monkeypatch):
    package = tmp_path / "slow_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("import time\ntime.sleep(0.2)\nregistry.register('one')(type('One', (), {}))\n")
    fresh = registry.Registry("thing", "slow_plugins")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.registry", fresh, raising=False)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: fresh.names(), range(2))) == [["one"], ["one"]]


def test_a_name_cannot_be_registered_twice():
    fresh = registry.Registry("thing")

    @fresh.register("a")
    @dataclasses.dataclass(frozen=True)
    class First:
        pass

    with pytest.raises(ValueError, match="thing 'a' is registered twice"):

        @fresh.register("a")
        @dataclasses.dataclass(frozen=True)
        class Second:
            pass

    assert fresh.names() == ["a"]
    assert fresh.get("a") is First


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("solver", {"name": "ddim", "eta": 1.5}, "solver.eta must be between 0 and 1, got 1.5"),
        ("solver", {"name": "heun", "leading_euler_steps": -1}, "leading_euler_steps must be at least 0, got -1"),
        (
            "solver",
            {"name": "diffusers", "scheduler": "os.system"},
            "must be a class name in diffusers, got 'os.system'",
        ),
        ("strategy", {"name": "best_of_n", "n": 0}, "strategy.n must be at least 1, got 0"),
        ("model", {"name": "gmm", "process": "ve"}, "unknown process 've'"),
        ("model", {"name": "gmm", "fit": "faces"}, "model.fit must be null or 'digits', got 'faces'"),
        ("model", {"name": "gmm", "dim": 0}, "dim >= 1"),
        ("model", {"name": "gmm", "means": [[0.0], [1.0]], "weights": [1.0]}, "weights must be 2 positive numbers"),
        ("model", {"name": "gmm", "means": [[0.0]], "covariances": [[-1.0]]}, "positive definite"),
        ("model", {"name": "gmm", "means": [[0.0]], "covariances": [[1.0, 2.0]]}, "1 components in 1 dimensions"),
        ("model", {"name": "table", "vocabulary": 1}, "vocabulary >= 2"),
        ("model", {"name": "table", "vocabulary": 10, "length": 6}, "<= 100000"),
        ("model", {"name": "table", "vocabulary": 2, "length": 1, "probabilities": [1.0]}, "must be 2 numbers"),
        ("model", {"name": "digits", "path": "/no/such/folder"}, "model.path '/no/such/folder' is not a folder"),
    ],
)
def test_plugins_refuse_impossible_values(kind, spec, message):
    with pytest.raises(ValueError, match=message):
        registry.ALL[kind].build(spec)


def test_a_table_needs_some_probability():
    with pytest.raises(ValueError, match="probabilities"):
        registry.models.build({"name": "table", "vocabulary": 2, "length": 1, "probabilities": [0.0, 0.0]})


def test_ragged_means_are_refused():
    with pytest.raises(ValueError, match="model.means"):
        registry.models.build({"name": "gmm", "means": [[0.0, 1.0], [2.0]]})
