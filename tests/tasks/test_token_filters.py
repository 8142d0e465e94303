"""Filters of token probabilities: against brute force, in their limits, and in the solvers that take them."""

import itertools
import math

import numpy as np
import pytest
import torch
from token_oracles import TOK, Lookup, distance, kernel, law, noise_of, sampler_of, sampling_error, shares

from tasks import registry, unmasking
from tasks.recipe import Recipe

LAWS = torch.distributions.Dirichlet(torch.full((12,), 0.4, dtype=torch.float64))


@pytest.fixture(scope="module")
def laws():
    torch.manual_seed(0)
    sharp = torch.tensor([1.0] + [0.0] * 11, dtype=torch.float64)
    flat = torch.full((12,), 1 / 12, dtype=torch.float64)
    return torch.cat([LAWS.sample((40,)), sharp[None], flat[None]])


def apply(law, **spec):
    return unmasking.filtered(law, unmasking.completed([spec]))


def kept(law, **spec):
    return apply(law, **spec) > 0


def test_every_filter_keeps_the_most_likely_token_and_a_law(laws):
    for name in registry.filters.names():
        found = apply(laws, name=name)
        torch.testing.assert_close(found.sum(-1), torch.ones(len(laws), dtype=torch.float64))
        assert (found.gather(-1, laws.argmax(-1, keepdim=True)) > 0).all() or name == "typical"
        assert (found[laws == 0] == 0).all(), "no filter invents a token"


@pytest.mark.parametrize("name", [n for n in registry.filters.names() if n not in ("temperature", "cautious")])
def test_truncation_renormalises_what_it_keeps(name, laws):
    found = apply(laws, name=name)
    left = torch.where(found > 0, laws, 0.0)
    torch.testing.assert_close(found, left / left.sum(-1, keepdim=True))


def test_a_filter_sees_each_place_alone(laws):
    for name in registry.filters.names():
        alone = torch.stack([apply(law, name=name) for law in laws])
        torch.testing.assert_close(apply(laws.view(6, 7, 12), name=name).view(42, 12), alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "temperature"},
        {"name": "top_p", "p": 1.0},
        {"name": "min_p", "p_min": 0.0},
        {"name": "typical", "mass": 1.0},
        {"name": "top_h", "alpha": 1.0},
        {"name": "cautious", "trials": 1},
    ],
    ids=lambda s: s["name"],
)
def test_each_filter_has_a_setting_that_changes_nothing(spec, laws):
    torch.testing.assert_close(apply(laws, **spec), laws, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "temperature", "temperature": 0},
        {"name": "top_p", "p": 1e-9},
        {"name": "min_p", "p_min": 1.0},
        {"name": "top_h", "top_n": 1},
    ],
    ids=lambda s: s["name"],
)
def test_the_greediest_setting_keeps_the_most_likely_only(spec, laws):
    laws = laws[:-1]  # on a flat law min_p keeps all, which are equally likely
    assert (kept(laws, **spec).sum(-1) == 1).all()
    assert (apply(laws, **spec).argmax(-1) == laws.argmax(-1)).all()


def test_temperature_is_a_power(laws):
    power = laws ** (1 / 0.7)
    torch.testing.assert_close(
        apply(laws, name="temperature", temperature=0.7), power / power.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12
    )


def test_the_nucleus_is_the_smallest_set_with_enough_mass(laws):
    p = 0.6
    for one, keep in zip(laws[:12], kept(laws, name="top_p", p=p), strict=False):
        size = next(
            k for k in range(1, 13) if max(sum(c) for c in itertools.combinations(one.tolist(), k)) >= p - 1e-12
        )
        assert keep.sum() == size
        assert one[keep].sum() >= p - 1e-12


def test_min_p_is_relative_to_the_best(laws):
    assert (kept(laws, name="min_p", p_min=0.2) == (laws >= 0.2 * laws.max(-1, keepdim=True).values)).all()


def test_typical_tokens_are_those_nearest_to_the_entropy():
    law = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    entropy = -(law * law.log()).sum()
    nearest = (-law.log() - entropy).abs().argsort(stable=True)
    assert nearest[:2].tolist() == [1, 2], "not the most likely one"
    assert kept(law, name="typical", mass=0.4).tolist() == [False, True, True, False]
    assert kept(law, name="typical", mass=0.41).tolist() == [True, True, True, False]


@pytest.mark.parametrize("criterion", ["partial", "renormalised"])
def test_top_h_takes_tokens_while_their_entropy_fits(criterion, laws):
    alpha = 0.5
    for one, keep in zip(laws, kept(laws, name="top_h", alpha=alpha, criterion=criterion), strict=True):
        full = float(torch.special.entr(one).sum())
        ordered, size = sorted(one.tolist(), reverse=True), 1
        while size < 12 and ordered[size] > 0:
            part = np.array(ordered[: size + 1])
            part = part / part.sum() if criterion == "renormalised" else part
            if -(part * np.log(part)).sum() > alpha * full * (1 + 1e-12):
                break
            size += 1
        # the first token may itself break the bound, and then nothing is added to it
        if criterion == "partial" and -ordered[0] * math.log(ordered[0]) > alpha * full:
            size = 1
        assert keep.sum() == size


def test_the_two_criteria_of_top_h_differ_widely_on_a_hot_law():
    law = 1.0 / torch.arange(1, 1001, dtype=torch.float64)
    counts = [int(kept(law / law.sum(), name="top_h", criterion=c).sum()) for c in ("partial", "renormalised")]
    assert counts[0] > 3 * counts[1], counts  # 41 and 11


def test_cautious_is_the_likeliest_of_several_draws():
    law = torch.tensor([0.1, 0.4, 0.25, 0.25], dtype=torch.float64)
    entropy = float(torch.special.entr(law).sum())
    tries = 1 + round(4 * entropy / math.log(4))
    expected = np.zeros(4)
    for draws in itertools.product(range(4), repeat=tries):
        best = max(law[list(draws)])
        first = next(v for v in draws if law[v] == best)  # of equally likely ones, the first that was drawn
        expected[first] += math.prod(law[list(draws)].tolist())
    torch.testing.assert_close(apply(law, name="cautious", trials=5), torch.from_numpy(expected))


def test_certain_places_have_one_trial():
    law = torch.tensor([1 - 3e-3, 1e-3, 1e-3, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(apply(law, name="cautious", trials=10), law)


def test_filters_act_in_order():
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    hot = unmasking.filtered(law, unmasking.completed([{"name": "temperature", "temperature": 5.0}, {"name": "min_p"}]))
    assert (hot > 0).all()
    both = unmasking.completed([{"name": "top_p", "p": 0.7}, {"name": "min_p", "p_min": 0.7}])
    assert (unmasking.filtered(law, both) > 0).tolist() == [True, False, False]


def test_temperature_after_truncation_is_refused():
    with pytest.raises(ValueError, match="has temperature after top_p: temperature acts before truncation"):
        unmasking.completed([{"name": "top_p"}, {"name": "temperature", "temperature": 0.5}])


REFUSED = [
    ({"name": "top_p", "p": 0}, "at 0 it would remove every token"),
    ({"name": "min_p", "p_min": 1.2}, "above 1 it would remove every token"),
    ({"name": "typical", "mass": 0}, "at 0 it would remove every token"),
    ({"name": "top_h", "top_n": 0}, "without candidates it would remove every token"),
    ({"name": "top_h", "criterion": "both"}, "unknown top_h.criterion 'both'"),
    ({"name": "cautious", "trials": 0}, "none would remove every token"),
    ({"name": "temperature", "temperature": -1}, "temperature must be at least 0"),
    ({"name": "top_q"}, "unknown filter 'top_q', did you mean 'top_p'"),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[str(s) for s, _ in REFUSED])
def test_a_filter_that_leaves_nothing_is_refused(spec, message):
    for solver in ("ancestral", "confidence"):
        with pytest.raises(ValueError, match=message):
            registry.solvers.build({"name": solver, "filters": [spec]})


def test_a_filter_that_removes_every_token_of_some_law_is_refused_when_planning(monkeypatch):
    cls = registry.filters.get("min_p")
    monkeypatch.setattr(cls, "__call__", lambda self, logs: torch.where(logs > -0.1, logs, -torch.inf))
    made = recipe(solver={"name": "ancestral", "filters": [{"name": "min_p"}]})
    with pytest.raises(ValueError, match="filter min_p removed every token of a place; a filter must keep at least"):
        made.check()


# --- in solvers ------------------------------------------------------------------------------------------------------

WITH_FILTERS = [
    name for name in registry.solvers.names() if "filters" in registry.solvers.get(name).__dataclass_fields__
]
HOT = [{"name": "temperature", "temperature": 0.5}, {"name": "top_p", "p": 0.8}]


def recipe(**fields):
    base = {
        "model": {"name": "table", "seed": 5, "concentration": 0.25},
        "solver": "ancestral",
        "times": {"name": "uniform", "num_steps": 4},
        "guidance": "none",
        "strategy": "single",
    }
    return Recipe(**(base | fields)).completed()


def test_every_token_solver_takes_filters():
    masked = [n for n in registry.solvers.names() if registry.solvers.get(n).process == "masked"]
    assert sorted(masked) == sorted(WITH_FILTERS)


def test_filters_are_reached_by_dotted_path():
    made = recipe(solver={"name": "ancestral", "filters": [{"name": "temperature"}, {"name": "top_p"}]})
    changed = made.override({"solver.filters.0.temperature": 0.5, "solver.filters.1.p": 0.7})
    assert [dict(f) for f in changed.solver["filters"]] == [
        {"name": "temperature", "temperature": 0.5},
        {"name": "top_p", "p": 0.7},
    ]
    assert changed.key != made.key
    with pytest.raises(ValueError, match="solver.filters.2.p names item '2' of a list of 2"):
        made.override({"solver.filters.2.p": 0.5})


def test_a_bare_filter_name_and_its_defaults_make_the_same_rows():
    short, full = ([{"name": "top_p"}], [{"name": "top_p", "p": 0.9}])
    assert (
        recipe(solver={"name": "ancestral", "filters": short}).key
        == recipe(solver={"name": "ancestral", "filters": full}).key
    )


def test_filtered_ancestral_sampling_has_the_filtered_law():
    model, rows = Lookup(), 20_000
    spec = {"name": "ancestral", "filters": HOT}
    exact = law(model, [kernel(model, 1 / (4 - k), 0.0, unmasking.filtered(model.posterior, HOT)) for k in range(4)])
    found = shares(sampler_of(spec, 4, model).run(noise_of(rows)).x)
    assert distance(found, exact) < sampling_error(exact, rows)
    assert distance(exact, TOK.joint) > 0.2, "filters are no samplers"


@pytest.mark.parametrize("name", WITH_FILTERS)
def test_a_temperature_of_zero_makes_what_is_drawn_certain(name):
    extra = {"lsd": {"learn": "nothing"}, "edlm": {"window_low": 0.0, "window_high": 1.0}}.get(name, {})
    spec = {"name": name, "filters": [{"name": "temperature", "temperature": 0}]} | extra
    x = sampler_of(spec, 1).run(noise_of(50)).x
    assert (x == x[0]).all()
    assert (x[0] == Lookup().posterior[-1].argmax(-1)).all()


@pytest.mark.parametrize("name", WITH_FILTERS)
def test_the_prediction_that_strategies_see_is_not_filtered(name):
    extra = {"lsd": {"learn": "nothing"}}.get(name, {})
    sampler = sampler_of({"name": name, "filters": HOT} | extra, 4)
    state = sampler.step(sampler.start(noise_of(3)), noise_of(3))
    torch.testing.assert_close(state.x0_hat, Lookup().posterior[-1].expand(3, -1, -1))
