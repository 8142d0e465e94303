"""Schedules as data: what is refused and how, the round trip through JSON, cost, and what people read."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import registry
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.processes import VP
from tasks.sampler import CountedModel, Sampler
from tasks.schedule import SolverSchedule, Step, check_step, deepest, evaluations, parse_steps

MODEL = GMM().load("cpu")
ROWS = 2


def sample(schedule, rows=ROWS):
    """Rows that a schedule makes, and the evaluations that it spent."""
    solver = registry.solvers.build({"name": "unified", "steps": [step.to_data() for step in schedule.steps]})
    model = CountedModel(MODEL, 10**6)
    return Sampler(model, solver, schedule.times).run(RowNoise(0, torch.arange(rows))).x, model.rows / rows


def schedule_of(*steps, times=None):
    count = len(steps)
    return SolverSchedule(times or tuple(1.0 - i / count for i in range(count)) + (0.0,), tuple(steps))


# --- random valid schedules ------------------------------------------------------------------------------------------


@st.composite
def valid_steps(draw, i, count):
    """A step that may stand at place i of a schedule on a VP process."""
    prediction = draw(st.sampled_from(["x0", "eps", "v"]))
    variable = draw(st.sampled_from(["u", "t", "index"] if prediction == "v" else ["lam", "rho", "t", "index"]))
    start = 1 if variable == "index" else draw(st.integers(1, i + 1))
    order = draw(st.integers(1, min(i + 1, 4)))
    available = [o for o in range(start - i - 1, start) if o]
    points = None
    if draw(st.booleans()):
        points = tuple(
            tuple(draw(st.permutations(available))[: draw(st.integers(d, len(available)))]) for d in range(1, order)
        )
    corrector = draw(st.sampled_from(["none", "implicit"] if i == count - 1 else ["none", "pseudo", "implicit"]))
    stochastic = corrector == "none" and prediction != "v" and draw(st.booleans())
    return Step(
        order=order,
        prediction=prediction,
        variable=variable,
        start=start,
        points=points,
        scale=tuple(draw(st.lists(st.floats(0.0, 2.0), max_size=order - 1))),
        relax=draw(st.sampled_from(["none", "bh1", "bh2"])) if variable == "lam" else "none",
        corrector=corrector,
        kappa=draw(st.floats(0.0, 2.0)) if stochastic else 0.0,
        churn=draw(st.sampled_from([0.0, 0.02, 0.1])) if corrector == "none" else 0.0,
        call=draw(st.sampled_from(["model", "noise", "reuse"] if i else ["model", "noise"])),
    )


@st.composite
def valid_schedules(draw):
    count = draw(st.integers(1, 5))
    # Nodes are a thirtieth apart, so that no churn of a tenth lands on the evaluation before; all have many digits.
    nodes = sorted(draw(st.lists(st.integers(1, 28), min_size=count, max_size=count, unique=True)), reverse=True)
    times = (*(0.033 * n + 0.001 * math.pi for n in nodes), draw(st.sampled_from([0.0, 0.01 / 3])))
    steps = [draw(valid_steps(i, count)) for i in range(count)]
    for i in range(1, count):  # raised noise after a free correction is refused
        if steps[i - 1].corrector == "pseudo":
            steps[i] = replace(steps[i], churn=0.0)
    steps = tuple(steps)
    return SolverSchedule(times, steps, draw(st.text(max_size=5)))


@given(valid_schedules())
@settings(max_examples=100, deadline=None)
def test_a_schedule_survives_json_and_makes_the_same_rows_bit_for_bit(schedule):
    text = schedule.to_json()
    again = SolverSchedule.from_json(text)
    assert again == schedule
    assert again.to_json() == text
    ours, theirs = sample(schedule)[0], sample(again)[0]
    assert torch.isfinite(ours).all()
    assert torch.equal(ours, theirs)


@given(valid_schedules())
@settings(max_examples=100, deadline=None)
def test_the_cost_of_a_schedule_is_what_the_counter_counts(schedule):
    spent = sample(schedule)[1]
    free = schedule.steps[-1].corrector == "implicit" and schedule.times[-1] == 0  # there is no network at the data
    assert spent == sum(map(evaluations, schedule.steps)) - free


@given(valid_schedules())
@settings(max_examples=30, deadline=None)
def test_every_valid_schedule_has_words_for_every_step(schedule):
    text = schedule.read_aloud(MODEL.process)
    assert all(str(step) in text for step in schedule.steps)
    assert text.startswith(f"{len(schedule.steps)} steps, {schedule.nfe} evaluations")


# --- canonical JSON --------------------------------------------------------------------------------------------------


def test_json_leaves_defaults_out_sorts_names_and_keeps_every_digit():
    times = (1.0, 1 / 3, 0.1 + 0.2, 0.0)
    steps = (Step(), Step(order=2, relax="bh2"), Step(order=3, points=((-1,), (-1, -2)), scale=(1.0, 0.5)))
    text = SolverSchedule(times, steps, "three").to_json()
    assert text == (
        '{"note": "three", "solver_schedule": 1, "steps": [{}, {"order": 2, "relax": "bh2"}, '
        '{"order": 3, "points": [[-1], [-1, -2]], "scale": [1.0, 0.5]}], '
        '"times": [1.0, 0.3333333333333333, 0.30000000000000004, 0.0]}'
    )
    assert SolverSchedule.from_json(text).times == times


def test_json_is_the_same_however_a_schedule_was_written():
    plain = '{"times": [1, 0.5, 0], "steps": [{}, {"order": 2}]}'
    wordy = (
        '{"steps": [{"order": 1, "kappa": 0, "points": null}, {"relax": "none", "order": 2.0, "call": "model"}],'
        ' "note": "", "times": [1.0, 5e-1, 0], "solver_schedule": 1}'
    )
    assert SolverSchedule.from_json(plain) == SolverSchedule.from_json(wordy)
    assert SolverSchedule.from_json(plain).to_json() == SolverSchedule.from_json(wordy).to_json()


def test_points_survive_as_tuples():
    found = SolverSchedule.from_data({"times": [1, 0.5, 0], "steps": [{}, {"order": 2, "points": [[-1]]}]})
    assert found.steps[1].points == ((-1,),)
    assert hash(found) == hash(SolverSchedule.from_json(found.to_json()))


def test_steps_may_be_given_as_objects():
    assert parse_steps([Step(order=1), {"order": 2}]) == (Step(), Step(order=2))


# --- the default stencil ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "stencil"),
    [
        (Step(), ()),
        (Step(order=3), ((-1, -2), (-1, -2))),
        (Step(order=2, start=2), ((1,),)),
        (Step(order=3, start=3), ((1, 2), (1, 2))),
        (Step(order=4, start=2), ((1, -1, -2),) * 3),
        (Step(order=3, points=((-1,), (-2, -3))), ((-1,), (-2, -3))),
    ],
    ids=str,
)
def test_the_nearest_points_are_taken_unless_points_are_given(step, stencil):
    assert step.stencil == stencil


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG_STEPS = [
    ({"prediction": "x"}, "unknown prediction of a step 'x', did you mean 'x0'\\? Allowed: x0, eps, v"),
    ({"prediction": "score"}, "unknown prediction of a step 'score'\\. Allowed: x0, eps, v"),
    ({"variable": "lambda"}, "unknown variable of a step 'lambda', did you mean 'lam'\\? Allowed: lam, rho, t, u, ind"),
    ({"relax": "bh3"}, "unknown relax of a step 'bh3', did you mean 'bh[12]'\\? Allowed: none, bh1, bh2"),
    (
        {"corrector": "pseudos"},
        "unknown corrector of a step 'pseudos', did you mean 'pseudo'\\? Allowed: none, pseudo, i",
    ),
    ({"call": "modell"}, "unknown call of a step 'modell', did you mean 'model'\\? Allowed: model, noise, reuse"),
    ({"order": 0}, "order of a step must be between 1 and 6, got 0"),
    ({"order": 7}, "order of a step must be between 1 and 6, got 7"),
    ({"start": 0}, "start of a step must be at least 1, got 0"),
    ({"kappa": -0.5}, "kappa and churn must not be negative, got -0\\.5 and 0\\.0"),
    ({"churn": -1.0}, "kappa and churn must not be negative, got 0\\.0 and -1\\.0"),
    ({"prediction": "v"}, "prediction v is integrated along u, got variable 'lam'\\. Use u, t or index"),
    ({"prediction": "v", "variable": "rho"}, "prediction v is integrated along u, got variable 'rho'"),
    ({"variable": "u"}, "variable u belongs to prediction v, got prediction 'x0'\\. Use lam or t"),
    ({"relax": "bh2", "variable": "t"}, "relax bh2 is defined in variable lam, got 't'\\. Use relax none"),
    ({"kappa": 1.0, "prediction": "v", "variable": "u"}, "kappa > 0 needs prediction x0 or eps"),
    ({"kappa": 1.0, "corrector": "pseudo"}, "kappa > 0 cannot have a corrector: it would correct the fresh noise away"),
    ({"kappa": 1.0, "corrector": "implicit"}, "kappa > 0 cannot have a corrector"),
    ({"order": 2, "points": ()}, "order 2 needs points for 1 derivatives, got 0"),
    ({"points": ((-1,),)}, "order 1 needs points for 0 derivatives, got 1"),
    (
        {"order": 3, "points": ((-1,), (-1,))},
        "derivative 2 needs at least 2 different points, none of them 0, got \\[-1",
    ),
    ({"order": 2, "points": ((0,),)}, "derivative 1 needs at least 1 different points, none of them 0, got \\[0\\]"),
    (
        {"order": 2, "points": ((-1, -1),)},
        "derivative 1 needs at least 1 different points, none of them 0, got \\[-1, -1",
    ),
    ({"scale": (1.0,)}, "a step of order 1 has 0 derivatives to scale, got \\(1\\.0,\\)"),
    ({"order": 2, "scale": (1.0, 2.0)}, "a step of order 2 has 1 derivatives to scale"),
    ({"weights": (1.0, 0.5), "order": 2}, "weights says all of itself by them, so its order must be 1, got 2"),
    ({"weights": (1.0, 0.5), "corrector": "pseudo"}, "its corrector must be none, got pseudo"),
    ({"weights": (1.0, 0.5), "kappa": 1.0}, "its kappa must be 0\\.0, got 1\\.0"),
    ({"weights": (1.0, 0.5), "start": 2}, "a step with start 2 has 3 finite weights.*got \\[1\\.0, 0\\.5\\]"),
    ({"weights": (1.0, math.inf)}, "a step with start 1 has 2 finite weights.*got \\[1\\.0, inf\\]"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_STEPS, ids=[str(fields) for fields, _ in WRONG_STEPS])
def test_a_step_that_means_nothing_is_refused_with_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        Step(**fields)
    # As data, the message also says which step it was.
    with pytest.raises(ValueError, match=r"steps\.1\b|of a step"):
        parse_steps([{}, json.loads(json.dumps(fields))])


WRONG_DATA = [
    ({"orders": 2}, "unknown field of steps\\.0: 'orders', did you mean 'order'\\? Fields: order, prediction"),
    ({"order": "2"}, "steps\\.0\\.order must be a int, got '2' \\(str\\)"),
    ({"order": True}, "steps\\.0\\.order must be a int, got True \\(bool\\)"),
    ({"order": 1.5}, "steps\\.0\\.order must be a int, got 1\\.5"),
    ({"kappa": math.nan}, "steps\\.0\\.kappa must be a finite float, got nan"),
    ({"churn": math.inf}, "steps\\.0\\.churn must be a finite float, got inf"),
    ({"points": [-1], "order": 2}, "steps\\.0\\.points must be a list of list of int or null, got \\[-1\\]"),
    ({"points": [[-1.5]], "order": 2}, "steps\\.0\\.points must be"),
    ({"scale": ["a"], "order": 2}, "steps\\.0\\.scale\\.0 must be a float, got 'a'"),
    ({"order": 9}, "steps\\.0: the order of a step must be between 1 and 6, got 9"),
    (5, "steps\\.0 must be fields, for example \\{order: 2\\}, got 5"),
    ("ddim", "steps\\.0 must be fields"),
    (None, "steps\\.0 must be fields"),
]


@pytest.mark.parametrize(("data", "message"), WRONG_DATA, ids=[str(data) for data, _ in WRONG_DATA])
def test_data_that_is_no_step_is_refused_at_its_place(data, message):
    with pytest.raises(ValueError, match=message):
        parse_steps([data])


WRONG_TEXTS = [
    ("{", "a schedule must be JSON: Expecting property name"),
    ("", "a schedule must be JSON"),
    ("[1, 0]", "a schedule needs times and steps: \\{solver_schedule: 1, times"),
    ("null", "a schedule needs times and steps"),
    ('{"times": [1, 0]}', "a schedule needs times and steps"),
    ('{"times": [1, 0], "steps": [{}], "solver_schedule": 2}', "has format 2; known is 1\\. Update Solvus"),
    ('{"times": [1, 0], "steps": [{}], "solver_schedule": "1"}', "has format '1'; known is 1"),
    (
        '{"times": [1, 0], "steps": [{}], "nots": 1}',
        "unknown field of a schedule: 'nots', did you mean 'note'\\? Fields",
    ),
    ('{"times": [1, 0], "steps": "ab"}', "steps must be a list of steps, got 'ab'"),
    ('{"times": [1, 0], "steps": {}}', "steps must be a list of steps, got \\{\\}"),
    ('{"times": 5, "steps": [{}]}', "times must be a list of float, got 5"),
    ('{"times": [1, NaN], "steps": [{}]}', "times\\.1 must be a finite float, got nan"),
    ('{"times": [1, "0"], "steps": [{}]}', "times\\.1 must be a float, got '0'"),
    ('{"times": [1, 0.5], "steps": [{}, {}]}', "N steps needs N \\+ 1 times, got 2 steps and 2 times"),
    ('{"times": [1, 0.5, 0], "steps": [{}]}', "N steps needs N \\+ 1 times, got 1 steps and 3 times"),
    ('{"times": [1], "steps": []}', "N steps needs N \\+ 1 times, got 0 steps and 1 times"),
    ('{"times": [0.5, 1], "steps": [{}]}', "times of a schedule must decrease, got \\[0\\.5, 1\\.0\\]\\. Sort them"),
    ('{"times": [1, 0.5, 0.5], "steps": [{}, {}]}', "times of a schedule must decrease"),
    ('{"times": [1.5, 0], "steps": [{}]}', "times of a schedule must lie in \\[0, 1\\], got 1\\.5"),
    ('{"times": [1, -0.1], "steps": [{}]}', "times of a schedule must lie in \\[0, 1\\], got 1\\.0 … -0\\.1"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_TEXTS, ids=[text for text, _ in WRONG_TEXTS])
def test_a_text_that_is_no_schedule_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        SolverSchedule.from_json(text)


def test_times_that_are_no_numbers_are_refused():
    for times in ((1.0, math.nan), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="must decrease"):
            SolverSchedule(times, (Step(),))


def test_an_order_above_the_history_is_refused():
    with pytest.raises(
        ValueError, match=r"step 0 of order 2 needs the evaluation at -1 .* Allowed is an order of at mo"
    ):
        schedule_of(Step(order=2), Step())
    with pytest.raises(ValueError, match=r"step 1 of order 3 needs the evaluation at -2 .* at most 2 here"):
        schedule_of(Step(), Step(order=3))
    schedule_of(Step(), Step(order=2), Step(order=3), Step(order=4))


def test_a_base_before_the_beginning_is_refused():
    with pytest.raises(ValueError, match=r"step 1 starts 2 evaluations back, but only 1 came before\. Allowed: 1 … 2"):
        schedule_of(Step(), Step(start=3))


def test_points_that_lie_outside_the_run_are_refused():
    with pytest.raises(ValueError, match=r"step 2 of order 2 needs the evaluation at -3"):
        schedule_of(Step(), Step(), Step(order=2, points=((-3,),)))
    with pytest.raises(ValueError, match=r"step 1 of order 2 needs the evaluation at \+1"):
        schedule_of(Step(), Step(order=2, points=((1,),)))  # its own end, which only a corrector may see
    with pytest.raises(ValueError, match=r"needs the evaluation at \+2"):
        schedule_of(Step(), Step(order=2, start=2, points=((2,),)))


def test_a_pseudo_corrector_of_the_last_step_is_refused():
    with pytest.raises(
        ValueError, match=r"last step cannot have a pseudo corrector: no evaluation follows it\. Use none"
    ):
        schedule_of(Step(), Step(corrector="pseudo"))
    schedule_of(Step(corrector="pseudo"), Step(corrector="implicit"))


def test_a_reused_prediction_of_the_first_step_is_refused():
    with pytest.raises(ValueError, match=r"first step cannot reuse a prediction: there is none\. Use model or noise"):
        schedule_of(Step(call="reuse"), Step())


def test_every_step_of_a_schedule_is_checked():
    with pytest.raises(ValueError, match="step 2 of order 4"):
        check_step(2, 5, Step(order=4))
    check_step(3, 5, Step(order=4))


# --- cost ------------------------------------------------------------------------------------------------------------


def test_only_networks_are_counted():
    steps = (
        Step(call="noise"),
        Step(),
        Step(order=2, corrector="pseudo"),
        Step(call="reuse"),
        Step(corrector="implicit"),
    )
    assert [evaluations(step) for step in steps] == [0, 1, 1, 0, 2]
    assert schedule_of(*steps, times=(1.0, 0.8, 0.6, 0.4, 0.2, 0.1)).nfe == 4


def test_a_schedule_says_whether_it_draws_noise():
    assert not schedule_of(Step(), Step()).stochastic
    assert schedule_of(Step(), Step(kappa=0.1)).stochastic
    assert schedule_of(Step(), Step(churn=0.1)).stochastic


def test_memory_reaches_to_the_furthest_point():
    # The base is start - 1 evaluations back and a point further still; one more for the corrector of the step before.
    assert deepest((Step(),)) == 2
    assert deepest((Step(), Step(order=3))) == 4
    assert deepest((Step(start=3), Step())) == 4
    assert deepest((Step(order=2, start=2, points=((-2,),)),)) == 5


# --- what people read ------------------------------------------------------------------------------------------------


def test_read_aloud_says_every_choice():
    steps = (
        Step(call="noise"),
        Step(order=2, relax="bh2", corrector="pseudo"),
        Step(
            order=3, prediction="eps", variable="rho", points=((-1,), (-1, -2)), scale=(1.0, 0.5), corrector="implicit"
        ),
        Step(order=2, start=2, kappa=0.25, churn=0.05, call="reuse"),
    )
    text = SolverSchedule((1.0, 0.75, 0.5, 0.25, 0.0), steps, "mine").read_aloud()
    assert text.splitlines() == [
        "4 steps, 3 evaluations: mine",
        "  1 |========........................| 1.0000 -> 0.7500  order 1, data prediction, without a network call "
        "(pure noise)",
        "  2 |........========................| 0.7500 -> 0.5000  order 2, data prediction, in log-SNR, relaxed as "
        "bh2, corrected for free",
        "  3 |................========........| 0.5000 -> 0.2500  order 3, noise prediction, in sigma / alpha, "
        "derivatives from -1; -1,-2, scaled by 1, 0.5, corrected implicitly",
        "  4 |........................========| 0.2500 -> 0.0000  order 2, data prediction, in log-SNR, from the state "
        "of 1 evaluations ago, stochastic with kappa 0.25, after raising the noise by 5 %, with the last prediction",
    ]


def test_a_step_of_weights_says_them_and_survives_json():
    step = Step(prediction="v", variable="u", start=2, weights=(1.0, 0.25, -0.5))
    made = SolverSchedule((1.0, 0.5, 0.0), (Step(prediction="v", variable="u"), step))
    assert SolverSchedule.from_json(made.to_json()) == made
    words = made.read_aloud().splitlines()[2]
    assert "free weights, velocity prediction" in words and "weights 1, 0.25, -0.5" in words


def test_read_aloud_with_a_process_says_log_snr():
    text = schedule_of(Step(), Step(prediction="v", variable="u")).read_aloud(VP())
    assert "1.0000 -> 0.5000 (lam -5.06 -> -1.23)  order 1, data prediction" in text
    assert "0.5000 -> 0.0000 (lam -1.23 -> +inf)  order 1, velocity prediction" in text


def test_every_bar_has_one_width_and_shows_each_step():
    steps = (Step(),) * 5
    lines = SolverSchedule((1.0, 0.999, 0.99, 0.5, 0.001, 0.0), steps).read_aloud().splitlines()[1:]
    bars = [line.split("|")[1] for line in lines]
    assert {len(bar) for bar in bars} == {32}
    assert all("=" in bar for bar in bars[:4])  # however short; the last begins at the edge


def test_the_figure_has_a_point_at_every_node():
    steps = (Step(), Step(corrector="implicit"), Step(call="reuse"))
    schedule = SolverSchedule((0.9, 0.6, 0.3, 0.1), steps)
    trace = schedule.figure().data[0]
    assert list(trace.x) == [0, 1, 3, 3]
    assert list(trace.y) == [0.9, 0.6, 0.3, 0.1]
    assert trace.text[2] == str(steps[1])
    process = VP()
    assert list(schedule.figure(process).data[0].y) == [process.lam(t) for t in schedule.times]
    assert schedule.figure(process).layout.yaxis.title.text == "half log-SNR"
