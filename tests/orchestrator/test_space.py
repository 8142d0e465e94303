"""Search spaces: conditions, points that always run, known schedules read back, clear refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.baselines import listed, stock
from orchestrator.config import files_of
from orchestrator.space import Space, parse_axis
from tasks.adapt import weighted
from tasks.presets import PRESETS
from tasks.recipe import Recipe
from tasks.schedule import SolverSchedule

FULL = {
    "times": "free", "order": [1, 2, 3], "prediction": ["x0", "eps", "v"], "variable": ["lam", "t", "rho"],
    "points": ["full", "near"], "relax": ["none", "bh1", "bh2"], "scale": {"low": 0.0, "high": 3.0},
    "scale2": {"low": 0.0, "high": 2.0}, "corrector": ["none", "pseudo", "implicit"],
    "kappa": {"low": 0.0, "high": 1.0}, "call": ["model", "noise"],
}  # fmt: skip


def recipe(model: str = "gmm", **changes: Any) -> Recipe:
    return Recipe(model, "dpmpp_2m", "uniform", "none", "single").completed().override({"nfe": 5} | changes)  # type: ignore[arg-type]


# --- plain axes ------------------------------------------------------------------------------------------------------


def test_a_conditional_axis_exists_only_where_its_condition_holds() -> None:
    space = Space({"b": {"low": 0.0, "high": 1.0, "when": {"a": ["y", "z"]}}, "a": ["x", "y", "z"]})
    generator = np.random.default_rng(0)
    drawn = [space.sample(generator) for _ in range(100)]
    assert {params["a"] for params in drawn} == {"x", "y", "z"}
    assert all(("b" in params) == (params["a"] != "x") for params in drawn)
    assert space.shared == {"a"}
    assert space.decode({"a": "x"}) == {"a": "x"}


def test_conditions_may_follow_each_other() -> None:
    space = Space({"c": {"low": 0, "high": 3, "when": {"b": 1}}, "b": [0, 1], "a": [7]})
    assert [axis.name for axis in space.axes] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "empty space"),
        ({"a": []}, "one choice or more"),
        ({"a": {"low": 2.0, "high": 1.0}}, "is empty: low 2.0 is above high 1.0"),
        ({"a": {"low": 0.0, "high": 1.0, "lo": 3}}, "unknown field of search.space.a: 'lo', did you mean 'low'"),
        ({"a": [1, 2, 1]}, "a choice twice"),
        ({"a": {"choices": [1, 2], "low": 0}}, "both choices and an interval"),
        ({"a": [1, 2], "b": {"low": 0, "high": 1, "when": {"c": 1}}}, "unknown axis in search.space.b.when: 'c'"),
        ({"a": [1, 2], "b": {"low": 0, "high": 1, "when": {"a": 3}}}, "can never exist: a is never one of"),
        ({"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1], "when": {"a": 1}}}, "go in a circle"),
    ],
)
def test_an_empty_or_contradictory_space_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        Space(data)


@given(st.floats(-10, 10), st.floats(0.01, 5), st.floats(0, 1))
def test_a_fraction_of_an_interval_and_back(low: float, width: float, unit: float) -> None:
    axis = parse_axis("a", {"low": low, "high": low + width})
    assert axis.unit(axis.at(unit)) == pytest.approx(unit, abs=1e-6)


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gmm", "digits", "digits_flow"])
def test_every_point_is_a_schedule_that_runs_at_exactly_the_cost_asked_for(model: str) -> None:
    base = recipe(model)
    space = Space({"schedule": FULL | {"nfe": [2, 5]}}, base)
    generator = np.random.default_rng(0)
    for _ in range(60):
        params = space.sample(generator)
        found = base.override(space.decode(params))
        found.check()
        assert found.nfe == params["nfe"]
        assert len(space.features(params)) == len(space.features(space.middle()))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_point_that_is_read_back_from_its_schedule_is_the_same_schedule(seed: int) -> None:
    space = Space({"schedule": FULL | {"nfe": 4, "call": "model"}}, recipe())
    overrides = space.decode(space.sample(np.random.default_rng(seed)))
    again = space.encode(overrides)
    if again is not None:  # an implicit corrector made it shorter than the walk expects
        assert space.schedule is not None
        assert space.schedule.equal(space.decode(again)["schedule"], SolverSchedule.from_data(overrides["schedule"]))


def test_changing_a_later_step_leaves_the_earlier_ones_as_they_were() -> None:
    space = Space({"schedule": {"times": "free", "scale": {"low": 0.0, "high": 3.0}}}, recipe())
    params = space.middle()
    moved = space.decode(params | {"ratio.4": 0.3, "scale.4": 2.0})["schedule"]
    plain = space.decode(params)["schedule"]
    assert moved["times"][:4] == plain["times"][:4] and moved["times"][4] != plain["times"][4]
    assert moved["steps"][:4] == plain["steps"][:4]


@pytest.mark.parametrize("model", ["gmm", "digits_flow"])
@pytest.mark.parametrize(
    "preset", ["dpmpp_2m", "unipc", "unipc_bh1", "dpmpp_3m", "deis", "velocity_2m", "dpm_solver_2m"]
)
def test_presets_are_points_of_the_space(model: str, preset: str) -> None:
    space = Space({"schedule": FULL | {"nfe": 5, "kappa": 0.0, "call": "model"}}, recipe(model))
    base = recipe(model).override({"solver": {"name": "unified", "preset": preset}, "nfe": 5})
    wanted = base.parts.solver.schedule(base.parts.model.noising, base.grid[0])
    point = space.encode({"schedule": json.loads(wanted.to_json())})
    assert point is not None and space.schedule is not None
    assert space.schedule.equal(space.decode(point)["schedule"], wanted)


@pytest.mark.parametrize("model", ["gmm", "digits_flow"])
@pytest.mark.parametrize("preset", ["dpmpp_2m", "unipc", "dpmpp_2s", "f_pndm", "deis"])
def test_any_explicit_preset_has_a_point_in_a_space_of_weights(model: str, preset: str) -> None:
    data = {"prediction": "v", "weights": {"low": -2.0, "high": 2.0}, "time_shift": {"low": -0.3, "high": 0.3}}
    space = Space({"schedule": data}, recipe(model))
    assert len(space.axes) == 20 + 4 + 5
    base = recipe(model).override({"solver": {"name": "unified", "preset": preset}, "nfe": 5})
    process = base.parts.model.noising
    wanted = base.parts.solver.schedule(process, base.grid[0])
    point = space.encode({"schedule": json.loads(wanted.to_json())})
    assert point is not None and space.schedule is not None
    made = SolverSchedule.from_data(space.decode(point)["schedule"])
    exact = weighted(process, wanted, "v")
    assert np.allclose(made.times, wanted.times, atol=1e-12)
    assert all(np.allclose(a.weights, b.weights, atol=1e-12) for a, b in zip(made.steps, exact.steps, strict=True))
    assert not space.schedule.equal(space.decode(point)["schedule"], wanted)  # another recipe, with rows of its own
    assert space.schedule.equal(space.decode(space.encode(space.decode(point)) or {})["schedule"], made)
    assert space.encode({"schedule": {"times": [1, 0.5, 0], "steps": [{"corrector": "implicit"}, {}]}}) is None
    step = {"prediction": "v", "variable": "u", "weights": [1.0, -0.2]}  # of the state before, not of the first one
    told = space.encode({"schedule": {"times": [1, 0.8, 0.6, 0.4, 0.2, 0], "steps": 5 * [step]}})
    assert told is not None and [told[f"weight.4.{j}"] for j in range(6)] == pytest.approx([1.0] + 5 * [-0.2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": 1.0}, r"search.space.schedule.weights must be {low, high}, got 1.0"),
        ({"weights": {"low": -1, "high": 1.0}, "order": [1, 2]}, r"so order cannot be \[1, 2\]. Leave it out"),
        ({"weights": {"low": -1, "high": 1.0}, "scale": 0.5}, "so scale cannot be 0.5"),
        ({"weights": {"low": -1, "high": 1.0}, "prediction": ["x0", "v"]}, r"prediction cannot be .*Leave only one"),
    ],
)
def test_weights_beside_what_they_say_themselves_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space({"schedule": data}, recipe())


def test_a_grid_whose_fields_are_searched_needs_few_axes() -> None:
    data = {"times": {"name": "karras", "rho": {"low": 1.0, "high": 9.0}}, "nfe": [4, 6]}
    space = Space({"schedule": data}, recipe())
    assert {axis.name for axis in space.axes} == {"nfe", "times.rho"}
    few, many = (space.decode({"nfe": nfe, "times.rho": 3.0})["schedule"] for nfe in (4, 6))
    assert (len(few["steps"]), len(many["steps"])) == (4, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tims": "free"}, "did you mean 'times'"),
        ({"order": [1, 9]}, "unknown search.space.schedule.order '?9"),
        ({"nfe": 0}, "between 1 and 64, got 0"),
        ({"nfe": []}, "search.space.schedule.nfe is empty"),
        ({"scale": "much"}, "must be a number or"),
        ({"kappa": {"low": -1.0, "high": 1.0}}, "kappa must be"),
        ({"times": "logsnrr"}, "did you mean 'logsnr'"),
        ({"times": "ratios"}, "fixed number of steps"),
        ({"order": []}, "is empty"),
        ("free", "must be a mapping"),
    ],
)
def test_a_schedule_space_that_makes_no_sense_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space({"schedule": data}, recipe())


def test_masks_of_blocks_are_axes_that_are_read_back() -> None:
    space = Space({"schedule": {"times": "free", "order": 1, "skip": 12}}, recipe("digits"))
    point = space.sample(np.random.default_rng(0))
    schedule = space.decode(point)["schedule"]
    assert [step.get("skip", 0) for step in schedule["steps"]] == [point[f"skip.{i}"] for i in range(5)]
    assert space.encode({"schedule": schedule}) == pytest.approx(point)
    narrow = Space({"schedule": {"times": "free", "order": 1, "skip": 2}}, recipe("digits"))
    assert narrow.encode({"schedule": schedule}) is None, "it leaves out blocks that the space keeps"
    other = SolverSchedule.from_data(schedule | {"steps": [{}] * 5})
    assert space.schedule is not None and not space.schedule.equal(schedule, other)


@pytest.mark.parametrize(("model", "has"), [("gmm", "no blocks"), ("digits", "12 blocks")])
def test_more_blocks_than_the_network_has_are_refused(model: str, has: str) -> None:
    with pytest.raises(ValueError, match=f"skip is 13, but model {model} has {has} that can be left out"):
        Space({"schedule": {"times": "free", "skip": 13}}, recipe(model))
    with pytest.raises(ValueError, match="between 0 and 62, got 63"):
        Space({"schedule": {"skip": 63}}, recipe(model))


def test_a_token_model_has_no_steps_of_this_kind() -> None:
    tokens = Recipe("table", "ancestral", "uniform", "none", "single").completed()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule.order does not exist for tokens: model table is masked"):
        Space({"schedule": {"times": "free", "order": [1, 2]}}, tokens)


# --- baselines -------------------------------------------------------------------------------------------------------


def test_stock_baselines_are_all_deterministic_presets_on_all_grids_and_cost_what_was_asked() -> None:
    base = recipe()
    found = dict(stock(base, (4, 5)))
    presets = {overrides["solver"]["preset"] for overrides in found.values()}
    assert presets >= {name for name, s in PRESETS.items() if not s.kappa} - {
        "dpm_solver_1", "dpm_solver_3m",  # the same schedules as ddim and deis_log
    }  # fmt: skip
    assert {base.override(overrides).nfe for overrides in found.values()} == {4, 5}
    schedules = [
        (r.parts.solver.schedule(r.parts.model.noising, r.grid[0]).to_json(), r.nfe)
        for r in map(base.override, found.values())
    ]
    assert len({text for text, _ in schedules}) > 0.9 * len(schedules)


def test_listed_baselines_keep_their_names() -> None:
    found = listed([{"label": "mine", "solver": "heun"}, {"solver": "ddim"}], recipe(), ())
    assert found == [("mine", {"solver": "heun"}), ("baseline 2", {"solver": "ddim"})]
    with pytest.raises(ValueError, match="baselines.0 must map paths"):
        listed(["heun"], recipe(), ())


def test_strength_and_interval_of_guidance_are_searched_as_plain_overrides() -> None:
    space = Space(yaml.safe_load(files_of("space")["guidance"].read_text())["space"])
    base = recipe("digits", guidance="cfg")
    for seed in range(8):
        found = base.override(space.decode(space.sample(np.random.default_rng(seed))))
        found.check()
        assert found.guidance["sigma_low"] < found.guidance["sigma_high"] and 5 <= found.nfe <= 10


def test_every_space_that_ships_is_a_space() -> None:
    for name, path in files_of("space").items():
        data = yaml.safe_load(path.read_text())
        assert path.read_text().startswith("# @package search\n# "), name
        Space(data["space"], recipe("digits"))
