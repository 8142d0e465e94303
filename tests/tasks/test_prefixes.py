"""Trajectories that continue from a kept state: the same rows bit for bit, for exactly the evaluations left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.adapt import possible
from tasks.prefixes import keys
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.schedule import Step


class Kept:
    """States in a dict."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.reused = 0

    def load(self, key: str, first: int) -> Mapping[str, np.ndarray] | None:
        return self.found.get((key, first))

    def save(self, key: str, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        self.found[key, first] = dict(arrays)


def base(model: str = "gmm", **changes: Any) -> Recipe:
    plain = Recipe(model, "ddim", "uniform", "none", "single", batch_size=8).completed()  # type: ignore[arg-type]
    return plain.override(changes) if changes else plain


def scheduled(recipe: Recipe, times: tuple[float, ...], steps: list[Step]) -> Recipe:
    made = possible(recipe.parts.model.noising, times, steps)
    return recipe.override({"schedule": {"times": list(made.times), "steps": [s.to_data() for s in made.steps]}})


def same_rows(recipe: Recipe, states: Kept, start: int = 0, stop: int = 12) -> None:
    fresh, kept = generate(recipe, start, stop), generate(recipe, start, stop, states=states)
    for name in fresh:
        if name != "seconds":
            np.testing.assert_array_equal(fresh[name], kept[name], err_msg=name)


TIMES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
SPREAD = {
    "orders": [Step(1), Step(2), Step(3), Step(3), Step(1)],
    "pseudo correctors": [Step(1, corrector="pseudo"), *[Step(2, corrector="pseudo")] * 3, Step(1)],
    "implicit correctors": [Step(1, corrector="implicit"), *[Step(2, corrector="implicit")] * 3, Step(1)],
    "changing predictions": [Step(1), Step(2, "eps"), Step(2, "v", "u"), Step(2, "x0"), Step(2, "eps", "t")],
    "stochastic": [Step(1, kappa=1.0), Step(2, kappa=0.5), Step(2), Step(1, kappa=1.0), Step(1)],
    "churn": [Step(1), Step(1, churn=0.3), Step(2), Step(2, churn=0.1), Step(1)],
    "shifted times": [Step(1, time_shift=0.2), Step(2, time_shift=-0.3), Step(2), Step(2, time_shift=0.1), Step(1)],
    "without a call": [Step(1, call="noise"), Step(2), Step(1, call="reuse"), Step(2), Step(1)],
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_later_change_continues_from_the_state_before_it(name: str) -> None:
    steps, states = SPREAD[name], Kept()
    same_rows(scheduled(base(), TIMES, steps), states)
    assert states.reused == 0
    moved = (*TIMES[:4], 0.13, 0.0)
    same_rows(scheduled(base(), moved, steps), states)
    expected = sum((s.call == "model") + (s.corrector == "implicit") for s in steps[:3])
    assert states.reused == 12 * expected


def test_the_evaluations_saved_are_counted_exactly_with_guidance_too() -> None:
    recipe = base("digits", guidance={"name": "cfg", "scale": 2.0})
    states = Kept()
    same_rows(scheduled(recipe, TIMES, [Step(1), *[Step(2)] * 3, Step(1)]), states, 3, 19)
    same_rows(scheduled(recipe, TIMES, [Step(1), *[Step(2)] * 3, Step(2, variable="t")]), states, 3, 19)
    assert states.reused == 16 * 2 * 4


@pytest.mark.parametrize("preset", ["dpmpp_2s", "dpm_solver_3", "heun", "unipc", "dpmpp_2m_sde", "pndm"])
def test_presets_share_their_beginnings_with_themselves(preset: str) -> None:
    recipe = base(solver={"name": "unified", "preset": preset}, times={"name": "explicit", "values": list(TIMES)})
    moved = recipe.override({"times.values": [*TIMES[:4], 0.1, 0.0]})
    states = Kept()
    same_rows(recipe, states)
    same_rows(moved, states)
    assert states.reused > 0


def test_a_preset_and_the_same_steps_written_out_share_states() -> None:
    recipe = base(solver={"name": "unified", "preset": "dpmpp_2m"}, **{"times.num_steps": 5})
    schedule = recipe.parts.solver.schedule(recipe.parts.model.noising, recipe.grid[0])
    written = scheduled(base(), schedule.times, list(schedule.steps))
    assert keys(recipe) == keys(written) and len(keys(recipe)) == 4


def a_step(order: int, prediction: str, variable: str, corrector: str, kappa: float, churn: float, call: str) -> Step:
    return Step(
        order, prediction, "u" if prediction == "v" else variable, corrector=corrector,
        kappa=0.0 if prediction == "v" or corrector != "none" else kappa,
        churn=churn if call == "model" else 0.0, call=call,
    )  # fmt: skip


STEPS = st.lists(
    st.builds(
        a_step,
        st.integers(1, 4),
        st.sampled_from(["x0", "eps", "v"]),
        st.sampled_from(["lam", "rho", "t"]),
        st.sampled_from(["none", "pseudo", "implicit"]),
        st.sampled_from([0.0, 0.0, 1.0]),
        st.sampled_from([0.0, 0.0, 0.2]),
        st.sampled_from(["model", "model", "model", "reuse"]),
    ),
    min_size=5,
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(STEPS, STEPS, st.integers(0, 5))
def test_whatever_two_schedules_share_the_rows_are_those_of_a_fresh_run(
    one: list[Step], two: list[Step], shared: int
) -> None:
    states = Kept()
    for steps in (one, one[:shared] + two[shared:]):
        steps[0] = replace(steps[0], call="model")  # there is nothing to reuse yet
        after_pseudo = [False, *(step.corrector == "pseudo" for step in steps)]  # which raised noise cannot follow
        steps = [replace(step, churn=0.0) if p else step for step, p in zip(steps, after_pseudo, strict=False)]
        same_rows(scheduled(base(), TIMES, steps), states, 0, 8)


def test_a_state_that_remembers_too_little_is_not_used_and_is_replaced() -> None:
    states = Kept()
    short = scheduled(base(), TIMES, [Step(1)] * 5)
    long = scheduled(base(), TIMES, [Step(1), Step(1), Step(1), Step(4), Step(1)])
    same_rows(short, states)
    same_rows(long, states)
    assert states.reused == 12 * 2  # two entries serve at step 2; three are missing at step 3
    same_rows(scheduled(base(), TIMES, [Step(1), Step(1), Step(1), Step(4), Step(2, variable="t")]), states)
    assert states.reused == 12 * (2 + 4)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 4},
        {"dtype": "float64"},
        {"model.seed": 3},
        {"guidance": "cfg", "model.labels": True},
    ],
)
def test_anything_else_that_differs_shares_nothing(change: dict[str, Any]) -> None:
    steps = [Step(1), *[Step(2)] * 3, Step(1)]
    states = Kept()
    same_rows(scheduled(base(), TIMES, steps), states)
    same_rows(scheduled(base(**change), TIMES, steps), states)
    assert states.reused == 0


def test_an_earlier_time_that_differs_shares_nothing_after_it() -> None:
    states = Kept()
    same_rows(scheduled(base(), TIMES, [Step(1)] * 5), states)
    same_rows(scheduled(base(), (1.0, 0.81, *TIMES[2:]), [Step(1)] * 5), states)
    assert states.reused == 0


@pytest.mark.parametrize(
    "change",
    [{"solver": "ddim"}, {"solver": "heun"}, {"solver": {"name": "unified", "hooks": [{"name": "heavy_ball"}]}},
     {"times": "travel"}],
)  # fmt: skip
def test_what_cannot_be_shared_is_not(change: dict[str, Any]) -> None:
    assert keys(base(solver={"name": "unified"}).override(change)) == ()
