"""The search space of token samplers: times of every step, filters, remasking and strategies in one space."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dashboards.report import won
from dashboards.report.study import open_view
from dashboards.report.view import Row
from orchestrator.api import run
from orchestrator.baselines import stock
from orchestrator.config import compose, files_of, study
from orchestrator.space import Space
from tasks.recipe import Recipe

TABLE = {"name": "table", "seed": 5, "concentration": 0.25}


def recipe(**changes: Any) -> Recipe:
    base = Recipe(TABLE, "ancestral", "uniform", "none", "single", "linear").completed()  # type: ignore[arg-type]
    return base.override({"nfe": 6} | changes)


def test_every_point_is_a_falling_grid_of_exactly_the_cost_asked_for() -> None:
    base = recipe()
    space = Space({"schedule": {"nfe": [1, 2, 6], "times": "free"}}, base)
    generator = np.random.default_rng(0)
    for _ in range(60):
        params = space.sample(generator)
        made = base.override(space.decode(params))
        made.check()
        assert made.nfe == params["nfe"]
        assert set(params) == {"nfe", *(f"pace.{i}" for i in range(1, params["nfe"]))}
        assert len(space.features(params)) == len(space.features(space.middle()))
    assert space.nfes == (1, 2, 6) and [axis.name for axis in space.axes] == [
        "nfe",
        *(f"pace.{i}" for i in range(1, 6)),
    ]


def test_an_even_pace_is_the_uniform_grid_and_a_double_one_reveals_twice_as_much() -> None:
    space = Space({"schedule": {"times": "free"}}, recipe())
    even = space.decode({f"pace.{i}": 1.0 for i in range(1, 6)})["times"]["values"]
    np.testing.assert_allclose(even, np.linspace(1, 0, 7), atol=1e-15)
    assert space.middle() == {f"pace.{i}": pytest.approx(1.0) for i in range(1, 6)}
    fast = space.decode({f"pace.{i}": 2.0 if i == 3 else 1.0 for i in range(1, 6)})["times"]["values"]
    assert fast[:3] == even[:3], "earlier steps stay"
    assert fast[3] == pytest.approx(even[2] * (3 / 4) ** 2)
    assert 1.5 < (fast[2] - fast[3]) / (even[2] - even[3]) < 2


def test_known_grids_are_read_back() -> None:
    base = recipe()
    space = Space({"schedule": {"nfe": [2, 6], "times": {"low": 0.01, "high": 100.0, "log": True}}}, base)
    for overrides in ({"times": "quadratic"}, {"times": {"name": "explicit", "values": [1.0, 0.3, 0.0]}}, {"nfe": 2}):
        point = space.encode(overrides)
        assert point is not None
        found = base.override(space.decode(point)).grid[0]
        np.testing.assert_allclose(found, base.override(overrides).grid[0], atol=1e-9)
    assert space.encode({"nfe": 3}) is None


def test_a_grid_with_fields_is_searched_through_them() -> None:
    base = recipe()
    space = Space({"schedule": {"nfe": 4, "times": {"name": "shifted", "shift": {"low": 1.0, "high": 4.0}}}}, base)
    made = base.override(space.decode({"times.shift": 2.5}))
    assert made.times == {"name": "shifted", "num_steps": 4, "shift": 2.5}
    assert [axis.name for axis in space.axes] == ["times.shift"]
    assert space.encode({"times": {"name": "shifted", "num_steps": 4, "shift": 3.0}}) == {"times.shift": 3.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"schedule": {"order": [1, 2]}},
            "schedule.order does not exist for tokens: model table is masked. Allowed are",
        ),
        ({"schedule": {"nfe": 0}}, "whole numbers between 1 and 256, got 0"),
        ({"schedule": {"nfe": [], "times": "uniform"}}, "search.space.schedule.nfe is empty"),
        ({"schedule": {"times": {"low": 0.0, "high": 1.0}}}, "paces above 0"),
        ({"schedule": {"times": "explicit"}}, "has a fixed number of steps. Use free"),
        ({"schedule": {"times": {"name": "shifted", "shif": [1.0, 2.0]}}}, "did you mean 'shift'"),
        ({"schedule": ["free"]}, "must be a mapping"),
        ({"schedule": {"times": "free"}, "nfe": [2, 4]}, "has both schedule and nfe"),
        ({"schedule": {"times": "free"}, "times": ["uniform"]}, "has both schedule and times"),
    ],
)
def test_an_impossible_space_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space(data, recipe())


def test_stock_baselines_of_tokens_are_their_solvers() -> None:
    labels = [label for label, _ in stock(recipe(), (2, 6))]
    # Six steps are more than four tokens, so first hitting is left out there.
    assert labels == [
        *(f"{solver}, 2" for solver in ("ancestral", "first_hitting", "tau_leaping", "confidence", "remasking")),
        *(f"{solver}, 6" for solver in ("ancestral", "tau_leaping", "confidence", "remasking")),
    ]


def test_every_point_of_the_space_of_tokens_can_run() -> None:
    data = yaml.safe_load((Path(files_of("space")["tokens"])).read_text())
    base = Recipe("digits_tokens", "ancestral", "uniform", "none", "single", "class_log_prob").completed()  # type: ignore[arg-type]
    space, generator, seen = Space(data["space"], base), np.random.default_rng(0), set()
    for _ in range(150):
        params = space.sample(generator)
        made = base.override(space.decode(params))
        made.check()
        seen |= {(made.solver["name"], made.strategy["name"], *(f["name"] for f in made.solver["filters"]))}
        assert params["solver.filters.0.temperature"] == made.solver["filters"][0]["temperature"]
    assert len({point[0] for point in seen}) == len({point[1] for point in seen}) == 3
    assert {point[3] for point in seen if len(point) > 3} == {"top_p", "min_p", "typical", "top_h"}


def test_a_search_over_times_filters_and_strategies_runs(tmp_path: Path) -> None:
    metric = "{name: perplexity, model: {name: table, seed: 5}}"
    found = run(
        f"root={tmp_path}", "name=t", "model=table", "model.seed=5", "solver=ancestral", "reward=linear",
        "search=nsga2", "search.num_trials=4", "search.held_out=0", "num_samples=32", "batch_size=32", "tracker=none",
        f"metrics=[{{name: mean_reward, reward: linear}}, {metric}]",
        "search.baselines=[{solver: first_hitting, nfe: 3}]",
        "search.objectives=[quality/token_entropy, reward/linear, quality/perplexity]",
        "search.space={schedule: {nfe: 3, times: free}, solver.filters: [[], [{name: temperature}]], "
        "strategy: [single, best_of_n], strategy.n: {low: 2, high: 3, when: {strategy: best_of_n}}}",
    )  # fmt: skip
    table = found.trials().to_pylist()
    assert sum(bool(row["baseline"]) for row in table) == 1
    assert len(table) == 5 and all(row["state"] == "complete" for row in table)
    assert all(math.isfinite(row["value/quality/token_entropy"]) for row in table), "perplexity is never alone"
    view = open_view(str(tmp_path), "t")
    assert {"quality/perplexity", "quality/token_entropy"} <= set(view.qualities)
    judge = won.Judge("quality/token_entropy", view)
    assert judge.difference(*view.complete[:2]).shared == 32


def test_perplexity_alone_is_no_objective(tmp_path: Path) -> None:
    lines = [
        f"root={tmp_path}", "model=table", "solver=ancestral", "search=random", "search.space={nfe: [2, 4]}",
        "metrics=[{name: perplexity, model: {name: table}}]", "search.objective=quality/perplexity", "tracker=none",
    ]  # fmt: skip
    made = study(compose(lines))
    assert [spec["name"] for spec in made.metrics] == ["perplexity", "token_entropy", "cost"]
    with pytest.raises(ValueError, match="is won by a sampler that repeats the likeliest samples"):
        run(*lines)


def test_every_trial_of_the_grid_of_study_tokens_can_be_planned() -> None:
    made = study(compose(["study=tokens"]))
    assert made.name == "tokens"
    assert {spec["name"] for spec in made.metrics} >= {"frechet", "class_accuracy", "perplexity", "token_entropy"}
    grid, searched = made.search["parts"]
    for sampler in grid["space"]["sampler"]:
        for nfe in grid["space"]["nfe"]:
            made.recipe.override(sampler | {"nfe": nfe}).check()
    space = Space(searched["space"], made.recipe)
    generator = np.random.default_rng(0)
    for _ in range(20):
        made.recipe.override(space.decode(space.sample(generator))).check()
    grids = [made.recipe.override(space.decode(space.sample(generator))).grid[0] for _ in range(5)]
    assert all(a > b for grid_ in grids for a, b in pairwise(grid_))


def test_the_report_says_what_a_token_solver_does_to_probabilities() -> None:
    filters = [{"name": "temperature", "temperature": 0.8}, {"name": "top_h"}]
    made = recipe(solver={"name": "ancestral", "filters": filters})
    assert Row.of({"recipe": json.dumps({"solver": made.solver})}).solver == "ancestral (temperature 0.8, top_h 0.4)"
    named = {
        "confidence": "confidence (sampled)",
        "remasking": "remasking (eta 0.02)",
        "first_hitting": "first_hitting",
    }
    for solver, label in named.items():
        found = recipe(solver=solver, nfe=4).solver
        assert Row.of({"recipe": json.dumps({"solver": found})}).solver == label
