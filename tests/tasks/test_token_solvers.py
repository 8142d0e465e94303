"""Token solvers on a table whose law is known: exact laws by enumeration, published figures, cost and bad input.

The table ``TOK`` (3^4 strings) is the one for which the figures quoted here were measured before: total variation of
ancestral sampling, confidence decoding and importance sampling, and log E[e^(number of zeros)] = 1.7616.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from token_oracles import (
    TOK,
    Lookup,
    ancestral_law,
    distance,
    kernel,
    law,
    noise_of,
    sampler_of,
    sampling_error,
    shares,
    uniform,
)

from tasks import registry, unmasking
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.types import State

MODEL = Lookup()
EVERYWHERE = {"window_low": 0.0, "window_high": 1.0}


def run(spec, steps, rows, seed=0):
    return sampler_of(spec, steps, MODEL).run(noise_of(rows, seed)).x


def recipe(**fields):
    base = {
        "model": {"name": "table", "seed": 5, "concentration": 0.25},
        "solver": "ancestral",
        "times": {"name": "uniform", "num_steps": 4},
        "guidance": "none",
        "strategy": "single",
    }
    return Recipe(**(base | fields)).completed()


def test_the_table_is_that_of_the_published_figures():
    assert abs(math.log(TOK.joint @ np.exp((TOK.strings == 0).sum(1))) - 1.7616) < 5e-5
    figures = {1: 0.627, 2: 0.330, 4: 0.171, 8: 0.086, 32: 0.023, 128: 0.0066}
    for steps, figure in figures.items():
        assert abs(distance(ancestral_law(MODEL, steps), TOK.joint) - figure) < 0.002, steps


# --- laws ------------------------------------------------------------------------------------------------------------

EXACT = [
    ({"name": "first_hitting"}, 4),
    ({"name": "first_hitting", "tokens_per_step": 1}, 4),
    *[({"name": "confidence", "confidence": c, "quota": "linear"}, 4) for c in ("top", "margin", "entropy")],
]


@pytest.mark.parametrize(("spec", "steps"), EXACT, ids=str)
def test_one_token_a_step_is_exact_in_law(spec, steps):
    rows = 40_000
    assert distance(shares(run(spec, steps, rows)), TOK.joint) < sampling_error(TOK.joint, rows)


@pytest.mark.slow
def test_first_hitting_reaches_the_sampling_error_of_many_draws():
    found = np.mean([shares(run("first_hitting", 4, 200_000, seed)) for seed in range(2)], axis=0)
    assert distance(found, TOK.joint) < 0.01


MANY = [
    ({"name": "ancestral", "cache": True}, 100),
    ({"name": "tau_leaping"}, 100),
    ({"name": "remasking"}, 100),
    ({"name": "edlm", "k": 2}, 100),
]


@pytest.mark.parametrize(("spec", "steps"), MANY, ids=str)
def test_many_steps_of_unbiased_solvers_reach_the_table(spec, steps):
    rows = 2000
    # What independent draws within a step leave: at most the chance that two of four tokens share one, 6 / N.
    assert distance(shares(run(spec, steps, rows)), TOK.joint) < sampling_error(TOK.joint, rows) + 6 / steps


def test_a_few_ancestral_steps_have_the_enumerated_law():
    rows = 40_000
    for steps in (1, 8):
        exact = ancestral_law(MODEL, steps)
        assert distance(shares(run("ancestral", steps, rows)), exact) < sampling_error(exact, rows)


# --- first hitting ---------------------------------------------------------------------------------------------------


def test_hitting_times_fall_as_order_statistics_do():
    rows = 50_000
    sampler, noise = sampler_of("first_hitting", 4, MODEL), noise_of(rows)
    state = sampler.start(noise)
    for n in range(4, 0, -1):
        state = sampler.step(state, noise)
        tau = state.memory["tau"]
        # The (n - 1)-th smallest of L uniforms... the largest time at which n tokens are masked: mean n / (L + 1).
        assert abs(float(tau.mean()) - n / 5) < 5 * float(tau.std()) / math.sqrt(rows)
        assert (state.x == 3).sum(1).eq(n - 1).all()


def test_several_tokens_a_step_take_as_many_times_and_end_on_time():
    noise = noise_of(20_000)
    sampler = sampler_of("first_hitting", 2, MODEL)
    state = sampler.step(sampler.start(noise), noise)
    tau = state.memory["tau"]
    assert (state.x == 3).sum(1).eq(2).all()
    assert abs(float(tau.mean()) - 3 / 5) < 5 * float(tau.std()) / math.sqrt(20_000)
    assert (sampler.step(state, noise).x != 3).all()


def test_first_hitting_tells_the_model_each_row_its_own_time():
    told = []

    class Watching(Lookup):
        def denoise(self, x, t, cond=None):
            told.append(t)
            return super().denoise(x, t, cond)

    sampler_of("first_hitting", 4, Watching()).run(noise_of(50))
    assert all(t.shape == (50,) and t.dtype == torch.float64 for t in told)
    assert (told[0] == 1).all()
    assert all((b < a).all() for a, b in zip(told, told[1:], strict=False))


def test_rows_with_a_prompt_share_their_own_masks_among_the_steps():
    sampler, noise = sampler_of("first_hitting", 2, MODEL), noise_of(3)
    state = sampler.start(noise)
    x = torch.tensor([[3, 3, 3, 3], [0, 3, 3, 3], [0, 1, 2, 3]])
    state = sampler.step(replace(state, x=x), noise)
    assert (state.x == 3).sum(1).tolist() == [2, 1, 0]
    assert (sampler.step(state, noise).x != 3).all()


# --- the float32 Gumbel draw -----------------------------------------------------------------------------------------


ZIPF = 1.0 / torch.arange(1, 2001, dtype=torch.float64)
ZIPF = ZIPF / ZIPF.sum()


def test_float32_gumbel_reveals_too_few_masks_and_loses_the_tail():
    # Token j beats the mask with probability e^(-c / 2^24 k) at its own uniform 1 - k / 2^24, where c = (1 - delta) /
    # (delta p_j): the mean over the grid k = 1, 2, … is a geometric series. Over all numbers in (0, 1) it is 1 / c.
    delta = 1e-3
    c = (1 - delta) / (delta * ZIPF)
    wins = 2.0**-24 / torch.expm1(c * 2.0**-24)
    assert abs(float((1 / c).sum()) - delta) < 2e-6
    assert (
        abs(float(wins.sum()) / 9.31e-4 - 1) < 0.02
    )  # 9.46e-4; 9.31e-4, a top share of .137 and a tail of .129 were counted on draws
    share = wins / wins.sum()
    assert [round(float(x), 3) for x in (share[0], ZIPF[0])] == [0.129, 0.122]
    assert [round(float(x[500:].sum()), 3) for x in (share, ZIPF)] == [0.137, 0.169]


def test_float32_gumbel_noise_ends_at_the_logarithm_of_two_to_the_24():
    best = torch.tensor([0.0, 0.0])
    uniforms = torch.tensor([math.exp(-1.0), 1 - 1e-15], dtype=torch.float64)  # Gumbels 0 and 34.5
    for deficit, winner in ((16.5, 1), (16.7, 0), (30.0, 0)):
        logits = best - torch.tensor([0.0, deficit])
        assert unmasking.float32_gumbel(logits, uniforms) == winner
        assert (logits - torch.log(-torch.log(uniforms))).argmax() == 1, "the exact draw takes the rare token"


@pytest.mark.parametrize(("steps", "figure"), [(1000, 0.158), (4096, 0.0)])
def test_float32_gumbel_hardly_reveals_a_large_vocabulary_in_many_steps(steps, figure):
    # One of 50,257 equally likely tokens against a mask of probability 1 - 1/T. It wins at its largest uniforms only,
    # so these are gone through one by one, against the mask's on a grid of quantiles.
    share = 1 / steps / 50_257
    logits = torch.log(torch.tensor([1 - 1 / steps, share], dtype=torch.float64))
    top, quantiles = 64, (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ours = (1 - (torch.arange(top, dtype=torch.float64) + 0.5) * 2.0**-24).view(-1, 1, 1).expand(-1, 20_000, 1)
    uniforms = torch.cat([quantiles.view(1, -1, 1).expand(top, -1, 1), ours], dim=-1)
    wins = float(unmasking.float32_gumbel(logits, uniforms).double().mean(1).sum()) * 2.0**-24
    assert abs(wins / share - figure) < 0.003
    in_doubles = (logits - torch.log(-torch.log(uniforms))).argmax(-1).double().mean(1)
    assert float(in_doubles.sum()) * 2.0**-24 / share > figure + 0.02  # of the same uniforms, in full precision


def test_masks_are_revealed_at_a_tiny_rate_and_draws_keep_the_tail():
    rows = 100_000
    sampler = sampler_of("ancestral", (1.0, 0.999, 0.0), MODEL)
    x = sampler.step(sampler.start(noise_of(rows)), noise_of(rows)).x
    assert abs(float((x != 3).double().mean()) - 1e-3) < 3 * math.sqrt(1e-3 / (4 * rows))
    drawn = unmasking.draw(ZIPF.expand(4000, 1, -1), noise_of(4000), "token")
    for share, found in ((ZIPF[0], (drawn == 0)), (ZIPF[500:].sum(), (drawn >= 500))):
        assert abs(float(found.double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_which_masks_are_revealed_does_not_depend_on_the_vocabulary():
    # So the rate is right where the mask would win or lose a float32 draw against 50,000 rare tokens, too.
    x = torch.full((100, 4), 5000)
    few, many = (
        unmasking.reveal(x, torch.full((1, 1, v), 1 / v).expand(100, 4, v), 0.01, (), 5000, noise_of(100)) != 5000
        for v in (2, 5000)
    )
    assert torch.equal(few, many) and 0 < few.sum() < 20


@pytest.mark.parametrize("solver", ["first_hitting", "ancestral"])
def test_the_float32_draw_is_right_where_no_token_is_rare(solver):
    rows, spec = 20_000, {"name": solver, "gumbel": "float32"}
    exact = TOK.joint if solver == "first_hitting" else ancestral_law(MODEL, 4)
    assert distance(shares(run(spec, 4, rows)), exact) < sampling_error(exact, rows)


# --- cached ancestral ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_the_cache_changes_no_row_and_saves_what_theory_says(steps):
    rows = 3000
    plain, cached = (sampler_of({"name": "ancestral", "cache": c}, steps, MODEL) for c in (False, True))
    assert torch.equal(plain.run(noise_of(rows)).x, cached.run(noise_of(rows)).x)
    expected = steps * (1 - (1 - 1 / steps) ** 4)
    spent = cached.model.rows / rows
    # A row's first prediction is made whether or not its first step reveals anything.
    assert expected - 5 / math.sqrt(rows) < spent < expected + 1 + 5 / math.sqrt(rows)
    assert plain.model.rows == steps * rows


def test_rows_say_what_a_cached_run_cost():
    made = recipe(solver={"name": "ancestral", "cache": True}, times={"name": "uniform", "num_steps": 100})
    made.check()
    assert not made.account.exact and made.nfe == 100
    rows = generate(made, 0, 64)
    assert (rows["nfe"] <= 6).all()
    plain = generate(recipe(times={"name": "uniform", "num_steps": 100}), 0, 64)
    assert (rows["x0"] == plain["x0"]).all()


# --- tau-leaping -----------------------------------------------------------------------------------------------------


def test_an_euler_leap_is_an_ancestral_step_draw_for_draw():
    assert torch.equal(run({"name": "tau_leaping", "leap": "euler"}, 7, 500), run("ancestral", 7, 500))


def test_tau_leaping_holds_the_rate_of_the_step_s_beginning():
    rows = 40_000
    rates = [1 - math.exp(-1 / 4), 1 - math.exp(-1 / 3), 1 - math.exp(-1 / 2), 1.0]
    exact = law(MODEL, [kernel(MODEL, r) for r in rates])
    assert distance(shares(run("tau_leaping", 4, rows)), exact) < sampling_error(exact, rows)
    assert distance(exact, TOK.joint) > distance(ancestral_law(MODEL, 4), TOK.joint) + 0.005


def test_tau_leaping_approaches_the_table_at_first_order():
    def error(n):
        rates = [1 - math.exp(-1 / (n - k)) for k in range(n - 1)] + [1.0]
        return distance(law(MODEL, [kernel(MODEL, r) for r in rates]), TOK.joint)

    assert abs(math.log2(error(32) / error(64)) - 1) < 0.3


# --- confidence ------------------------------------------------------------------------------------------------------

BIASED = [({}, 4, 0.521), ({}, 2, 0.382), ({"gumbel": 4.5}, 4, 0.049)]


@pytest.mark.parametrize(("fields", "steps", "figure"), BIASED, ids=str)
def test_the_confidence_of_the_drawn_token_is_biased_as_measured(fields, steps, figure):
    rows = 40_000
    found = distance(shares(run({"name": "confidence", "quota": "linear"} | fields, steps, rows)), TOK.joint)
    assert abs(found - figure) < 0.01


def test_quotas_are_each_row_s_own_and_follow_the_schedule():
    for quota, left in (("linear", [6, 4, 2, 0]), ("cosine", [7, 5, 3, 0])):
        solver = registry.solvers.build({"name": "confidence", "quota": quota})
        memory, x = solver.start(MODEL.process, uniform(4)), torch.full((2, 8), 3)
        x[1, 4:] = 0

        state = State(x, None, memory)
        for k in range(4):
            state = solver.step(Flat(), state, 1 - k / 4, 0.75 - k / 4, noise_of(2).at(k))
            masks = (state.x == 3).sum(1).tolist()
            share = 0.75 - k / 4 if quota == "linear" else math.cos(math.pi / 2 * (k + 1) / 4)
            assert masks == [left[k], math.floor(4 * share + 1e-9)]


# --- remasking -------------------------------------------------------------------------------------------------------


def remasking_law(num_steps, **fields):
    solver = registry.solvers.build({"name": "remasking"} | fields)
    found = []
    for k in range(num_steps):
        t, s = (num_steps - k) / num_steps, (num_steps - k - 1) / num_steps
        varsigma = solver.varsigma(t, s)
        found.append(kernel(MODEL, ((t - s) + varsigma * (1 - t)) / t, varsigma))
    return law(MODEL, found)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"schedule": "cap"}, {"schedule": "rescale"}], ids=str)
def test_remasking_with_a_thousand_steps_has_the_table_s_law(fields):
    assert distance(remasking_law(1000, **fields), TOK.joint) < 0.01


@pytest.mark.parametrize("fields", [{}, {"eta": 0.5}, {"schedule": "rescale", "eta": 0.5}], ids=str)
def test_remasking_samples_its_own_transition(fields):
    rows = 30_000
    exact = remasking_law(6, **fields)
    assert distance(shares(run({"name": "remasking"} | fields, 6, rows)), exact) < sampling_error(exact, rows)


def test_the_caps_keep_probabilities_and_the_number_of_masks():
    for schedule in ("cap", "rescale"):
        for eta in (0.0, 0.02, 0.5, 1.0):
            solver = registry.solvers.build({"name": "remasking", "schedule": schedule, "eta": eta})
            for t, s in ((1.0, 0.9), (0.9, 0.5), (0.5, 0.45), (0.2, 0.1), (0.1, 0.0)):
                varsigma = solver.varsigma(t, s)
                most = 1.0 if t == 1 else min(1.0, s / (1 - t))
                assert varsigma == (min(eta, most) if schedule == "cap" else eta * most)
                revealed = ((t - s) + varsigma * (1 - t)) / t
                assert -1e-12 < revealed < 1 + 1e-12
                assert abs(t * (1 - revealed) + (1 - t) * varsigma - s) < 1e-12


@pytest.mark.parametrize(
    "fields", [{}, {"confident": True}, {"loop": True}, {"loop": True, "confident": True}], ids=str
)
def test_masks_stay_on_schedule_while_tokens_are_masked_again(fields):
    rows, steps, length = 200, 20, 64
    solver = registry.solvers.build({"name": "remasking", "eta": 0.3} | fields)
    state, again, times = State(torch.full((rows, length), 3)), 0, uniform(steps)
    for k in range(steps):
        before, state = state.x, solver.step(Flat(), state, times[k], times[k + 1], noise_of(rows).at(k))
        again += int(((before != 3) & (state.x == 3)).sum())
        share = solver._time(times[k + 1])
        error = math.sqrt(max(share * (1 - share), 1e-9) / (rows * length))
        assert abs(float((state.x == 3).double().mean()) - share) < 5 * error
    assert again > 0


class Flat:
    """Three tokens, equally likely everywhere; as a solver sees a model."""

    process = MODEL.process

    def denoise(self, x, t):
        return torch.full((*x.shape, 3), 1 / 3, dtype=torch.float64)


def test_confident_remasking_prefers_tokens_that_were_unlikely():
    solver = registry.solvers.build({"name": "remasking", "eta": 0.5, "confident": True})
    x = torch.tensor([[0, 1, 2, 3]]).expand(20_000, 4)
    psi = torch.tensor([[0.05, 0.5, 0.95, 0.0]], dtype=torch.float64).expand(20_000, 4)
    state = solver.step(Flat(), State(x, None, psi), 0.3, 0.2, noise_of(20_000))
    rate = (state.x[:, :3] == 3).double().mean(0)
    expected = 0.2 / 0.7 * torch.softmax(-psi[0, :3], 0)
    assert (abs(rate - expected) < 5 * (expected / 20_000).sqrt()).all()


def test_the_loop_holds_the_signal():
    solver = registry.solvers.build({"name": "remasking", "loop": True})
    assert [round(solver._time(t), 12) for t in (1.0, 0.55, 0.3, 0.05, 0.025, 0.0)] == [1.0, 0.1, 0.1, 0.1, 0.05, 0.0]


def test_without_remasking_it_is_ancestral_draw_for_draw():
    assert torch.equal(run({"name": "remasking", "eta": 0.0}, 7, 500), run("ancestral", 7, 500))


# --- energy ----------------------------------------------------------------------------------------------------------


def test_the_table_knows_the_log_probability_of_whole_strings():
    found = TOK.load("cpu").energy_log_prob(torch.from_numpy(TOK.strings))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), np.log(TOK.joint), rtol=1e-12)


def test_one_candidate_is_ancestral_sampling_draw_for_draw():
    assert torch.equal(run({"name": "edlm", "k": 1} | EVERYWHERE, 5, 500), run("ancestral", 5, 500))


@pytest.mark.parametrize(("k", "figure", "rows"), [(4, 0.278, 40_000), (16, 0.067, 40_000)], ids=str)
def test_one_step_of_importance_sampling_is_as_near_as_measured(k, figure, rows):
    found = distance(shares(run({"name": "edlm", "k": k} | EVERYWHERE, 1, rows)), TOK.joint)
    assert abs(found - figure) < 0.01


def test_sixty_four_candidates_nearly_close_the_gap_of_one_step():
    rows = 20_000
    assert distance(shares(run({"name": "edlm", "k": 64} | EVERYWHERE, 1, rows)), TOK.joint) < 0.03


@pytest.mark.slow
def test_four_steps_of_sixteen_candidates_are_as_near_as_measured():
    rows = 60_000
    found = distance(shares(run({"name": "edlm", "k": 16} | EVERYWHERE, 4, rows)), TOK.joint)
    assert abs(found - 0.026) < 0.01


def test_the_wrong_sign_of_the_energy_drives_samples_away(monkeypatch):
    from tasks.solvers import edlm

    monkeypatch.setattr(edlm, "log_weights", lambda log_p, log_q: log_q - log_p)
    assert distance(shares(run({"name": "edlm", "k": 16} | EVERYWHERE, 1, 20_000)), TOK.joint) > 0.9


def test_candidates_help_few_steps_and_are_counted():
    rows = 20_000
    sampler = sampler_of({"name": "edlm", "k": 8} | EVERYWHERE, 4, MODEL)
    found = distance(shares(sampler.run(noise_of(rows)).x), TOK.joint)
    assert found < distance(ancestral_law(MODEL, 4), TOK.joint) / 3
    assert (sampler.model.rows, sampler.model.energies) == (4 * rows, 4 * 8 * rows)


def test_rows_say_how_often_whole_strings_were_asked_for():
    made = recipe(solver={"name": "edlm", "k": 3}, times={"name": "uniform", "num_steps": 10})
    made.check()
    rows = generate(made, 0, 8)
    assert (rows["nfe"] == 10).all() and (rows["energy_calls"] == 3 * 3).all()  # at .6, .5 and .4
    assert "energy_calls" not in generate(recipe(), 0, 8)


def test_filtered_candidates_are_weighed_by_the_law_they_came_from():
    spec = {"name": "edlm", "k": 32, "filters": [{"name": "temperature", "temperature": 2.0}]} | EVERYWHERE
    assert distance(shares(run(spec, 1, 8000)), TOK.joint) < 0.1


# --- every token solver ----------------------------------------------------------------------------------------------

SETTINGS = {"lsd": {"learn": "nothing"}, "edlm": EVERYWHERE}
NAMES = [n for n in registry.solvers.names() if registry.solvers.get(n).process == "masked"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_their_draws_in_any_order(name):
    spec, index = {"name": name} | SETTINGS.get(name, {}), torch.tensor([4, 0, 3, 1, 2])
    straight = sampler_of(spec, 4, MODEL).run(noise_of(5)).x
    turned = sampler_of(spec, 4, MODEL).run(RowNoise(0, index, dtype=torch.float64)).x
    assert torch.equal(turned, straight[index])
    assert torch.equal(sampler_of(spec, 4, MODEL).run(noise_of(5)).x, straight)


@pytest.mark.parametrize("name", NAMES)
def test_different_rows_and_seeds_draw_differently(name):
    spec = {"name": name} | SETTINGS.get(name, {})
    a, b = (run(spec, 4, 40, seed) for seed in (0, 1))
    assert len(a.unique(dim=0)) > 3 and not torch.equal(a, b)


REFUSED = [
    ({"name": "first_hitting"}, 5, "at least one of 4 tokens a step, but the grid has 5 steps. Set nfe=4"),
    ({"name": "first_hitting", "tokens_per_step": 2}, 4, "4 tokens, 2 a step, take 2 steps"),
    ({"name": "edlm"}, 2, None),
    ({"name": "edlm", "window_low": 0.3, "window_high": 0.4}, 2, "no step begins between window_low=0.3"),
    ({"name": "remasking", "loop": True, "t_on": 0.4, "t_off": 0.3}, 2, "no step of the grid lies between"),
]


@pytest.mark.parametrize(("solver", "steps", "message"), REFUSED, ids=str)
def test_what_cannot_run_is_refused_when_planning(solver, steps, message):
    made = recipe(solver=solver, times={"name": "uniform", "num_steps": steps})
    if message is None:
        made.check()
        return
    with pytest.raises(ValueError, match=message):
        made.check()


IMPOSSIBLE = [
    ({"name": "ancestral", "gumbel": "float16"}, "unknown gumbel 'float16'"),
    ({"name": "ancestral", "gumbel": "float32", "cache": True}, "Set one of them to its default"),
    ({"name": "first_hitting", "tokens_per_step": 0}, "tokens_per_step must be at least 1"),
    ({"name": "tau_leaping", "leap": "midpoint"}, "unknown leap 'midpoint'"),
    ({"name": "confidence", "confidence": "entropie"}, "did you mean 'entropy'"),
    ({"name": "confidence", "quota": "square"}, "unknown quota 'square'"),
    ({"name": "confidence", "gumbel": -1.0}, "solver.gumbel must be at least 0"),
    ({"name": "remasking", "eta": 1.5}, "solver.eta must be between 0 and 1"),
    ({"name": "remasking", "t_on": 0.01}, "0 < t_off < t_on < 1"),
    ({"name": "edlm", "temperature": 0.0}, "temperature above 0"),
    ({"name": "edlm", "window_low": 0.7}, "window_low <= window_high"),
]


@pytest.mark.parametrize(("spec", "message"), IMPOSSIBLE, ids=str)
def test_impossible_settings_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.solvers.build(spec)


def test_a_model_without_an_energy_or_that_looks_at_the_time_is_refused(monkeypatch):
    cls = registry.models.get("table")
    monkeypatch.setattr(cls, "gives", ("posterior_mean",))
    with pytest.raises(ValueError, match="solver edlm needs a model that gives the log-probability of whole strings"):
        recipe(solver="edlm").check()
    monkeypatch.setattr(cls, "ignores_time", False)
    with pytest.raises(ValueError, match="cache=true keeps predictions from earlier times"):
        recipe(solver={"name": "ancestral", "cache": True}).check()


def test_solvers_with_times_of_their_own_are_refused_where_predictions_are_shared():
    steer = {"name": "fk_steering", "lag": False}
    for solver in ({"name": "first_hitting"}, {"name": "ancestral", "cache": True}, {"name": "edlm"}):
        made = recipe(solver=solver, strategy=steer, reward={"name": "linear"})
        with pytest.raises(ValueError, match="fk_steering scores a particle by its own prediction"):
            made.check()
