"""Savings: what they are without effect, what they cost, how far their rows go, what is refused."""

import numpy as np
import pytest
import torch

from tasks import dit, pruned, registry, side_network
from tasks.branches import Branches
from tasks.int8 import best_range, integer
from tasks.recipe import Recipe
from tasks.run import generate, load_model, score
from tasks.savings import Meter, twin
from tasks.training import digits as training


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A DiT with weights that matter."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    net = training.transformer().eval()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    training.save(net, "digits_dit", folder)
    return {"name": "digits_dit", "path": str(folder)}


def recipe(model="digits", guidance="none", solver="ddim", steps=8, **changes):
    times = {"name": "uniform", "num_steps": steps}
    plain = Recipe(model, solver, times, "none", "single", batch_size=8).completed()
    return plain.override({"guidance": guidance} | changes)


def rows(made):
    made.check()
    return generate(made, 0, 8)


def distance(made, found):
    """Of every row to the same one without savings."""
    spec = registry.features.complete({"name": "acceleration_distance"})
    companion = generate(made.companion(spec), 0, 8)
    return score(spec, found["x0"], found["label"], 0, 8, "cpu", companion["x0"])[:, 0]


# --- SADA ------------------------------------------------------------------------------------------------------------

SADA = {"name": "unified", "preset": "dpmpp_2m", "hooks": [{"name": "sada"}]}


def test_sada_without_skips_is_the_solver_bit_for_bit_and_with_some_costs_less_near_the_same_rows():
    plain = recipe(solver={"name": "unified", "preset": "dpmpp_2m"}, steps=16)
    never = recipe(solver=SADA | {"hooks": [{"name": "sada", "max_skips": 0}]}, steps=16)
    np.testing.assert_array_equal(rows(never)["x0"], rows(plain)["x0"])
    made = recipe(solver=SADA, steps=16)
    found = rows(made)
    assert (found["nfe"] < 16).all() and (found["nfe"] >= 5).all() and made.nfe == 16 and not made.account.exact
    assert 0 < distance(made, found).max() < 0.25
    guided = rows(recipe(solver=SADA, steps=16, guidance="cfg"))
    assert (guided["nfe"] % 2 == 0).all() and guided["nfe"].max() < 32


def test_sada_is_exact_where_the_noise_prediction_stands_still():
    """A trajectory of one point mass is straight: every call left out changes nothing."""
    point = {"name": "gmm", "means": [[0.3, -0.7]], "weights": [1.0], "covariances": [[[1e-9, 0.0], [0.0, 1e-9]]]}
    made = recipe(point, solver=SADA, steps=16, dtype="float64")
    assert distance(made, rows(made)).max() < 1e-6


def tokenwise(model, max_token_skips=3, max_skips=1, guidance="none", batch_size=8, **fields):
    hook = {"name": "sada", "max_skips": max_skips, "max_token_skips": max_token_skips} | fields
    return recipe(model, guidance, solver=SADA | {"hooks": [hook]}, steps=16, batch_size=batch_size)


def test_tokens_of_which_none_is_left_out_are_the_step_wise_half_bit_for_bit(transformer, monkeypatch):
    stepwise = rows(tokenwise(transformer, max_token_skips=0))
    everything = lambda urgency: (torch.full((8,), 16), torch.arange(16).expand(8, 16))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(pruned, "sized", everything)
        found = rows(tokenwise(transformer))
    np.testing.assert_array_equal(found["x0"], stepwise["x0"])
    np.testing.assert_array_equal(found["nfe"], stepwise["nfe"])
    assert (stepwise["nfe"] < 16).all() and "work" not in found
    never = rows(tokenwise(transformer, start=1.0, stop=1.0))  # no step is looked at
    np.testing.assert_array_equal(never["x0"], rows(recipe(transformer, solver=SADA | {"hooks": []}, steps=16))["x0"])


def test_tokens_that_are_left_out_save_work_and_every_row_decides_for_itself(transformer):
    made = tokenwise(transformer)
    together = rows(made)
    assert together["work"][0] < together["nfe"].mean() - 1 and 0 < distance(made, together).max() < 0.3
    assert not made.account.exact
    alone = rows(tokenwise(transformer, batch_size=1))
    np.testing.assert_allclose(alone["x0"], together["x0"], atol=1e-4)
    np.testing.assert_array_equal(alone["nfe"], together["nfe"])
    assert alone["work"].mean() == pytest.approx(together["work"][0])


def test_guided_tokens_keep_evaluations_with_and_without_labels_apart(transformer):
    """At a scale of 1 the guided prediction is the conditional one, so all decisions are those without guidance."""
    plain, guided = (rows(tokenwise(transformer, guidance=g)) for g in ("none", {"name": "cfg", "scale": 1.0}))
    np.testing.assert_allclose(guided["x0"], plain["x0"], atol=1e-4)
    np.testing.assert_array_equal(rows(tokenwise(transformer, guidance="cfg"))["nfe"] % 2, 0)
    saved = [(found["nfe"] - found["work"]).mean() for found in (plain, guided)]
    assert 0 < 2 * saved[0] == pytest.approx(saved[1])


def test_tokens_are_exact_where_the_noise_prediction_stands_still(tmp_path):
    torch.manual_seed(0)
    net = training.transformer().eval()
    torch.nn.init.zeros_(net.proj_out_2.weight)
    torch.nn.init.normal_(net.proj_out_2.bias)
    training.save(net, "digits_dit", tmp_path)
    made = tokenwise({"name": "digits_dit", "path": str(tmp_path)}, max_skips=0)
    found = rows(made)
    assert distance(made, found).max() < 1e-5 and (found["nfe"] == 16).all() and found["work"][0] < 14


def test_rows_compute_all_tokens_that_they_must_and_fill_up_to_a_quarter():
    inf = torch.inf
    urgency = torch.tensor([[0.0, -1, -2, -3, inf, -4, -5, -6], [inf, inf, inf, -1, -2, -3, -4, -0.5], [-1.0] * 8])
    count, order = pruned.sized(urgency)
    assert count.tolist() == [2, 4, 2]
    assert order[0, :2].tolist() == [4, 0] and order[1, :4].tolist() == [0, 1, 2, 7]


def test_what_rows_remember_of_tokens_stays_theirs(transformer):
    """Some rows in one call, others in another, of other tokens: as if every row had been alone."""
    model = load_model(recipe(transformer))
    torch.manual_seed(3)
    x, later = torch.randn(2, 3, 1, 8, 8)
    time, labels = torch.tensor([700.0, 700.0, 700.0]), torch.tensor([1, 5, 4])
    active = torch.stack([torch.randperm(16)[:4] for _ in range(3)])

    def run(groups):
        memory, found = {}, torch.zeros(3, 1, 8, 8)
        for state, chosen in ((x, None), (later, active), (x, active)):
            for group in groups:
                part = pruned.Pruned(model.network, memory, 3, group, None if chosen is None else chosen[group])
                found[group] = part(state[group], time[group], labels[group]).sample
                memory = part.memory
        return found

    with torch.no_grad():
        together = run([torch.arange(3)])
        apart = run([torch.tensor([2, 0]), torch.tensor([1])])
        kept = model.network(x, time, labels).sample
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    left_out = torch.ones(3, 16, dtype=torch.bool).scatter(1, active, False)
    same = dit.patches(model.network, together)[left_out], dit.patches(model.network, kept)[left_out]
    torch.testing.assert_close(*same, atol=1e-5, rtol=1e-5)


# --- step caching ----------------------------------------------------------------------------------------------------


def test_a_twin_shares_weights_and_no_hooks_and_a_meter_reads_shares():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    other = twin(net)
    assert other[0].weight is net[0].weight
    meter = Meter(other)
    net(torch.zeros(5, 3))
    assert meter.spent == 0
    other(torch.zeros(5, 3))
    assert meter.spent == 5 * 20 and meter.share() == 1.0
    other[0](torch.zeros(5, 3))
    assert meter.share() == 0.6


def test_caches_without_effect_are_the_model_bit_for_bit(transformer):
    plain = rows(recipe(transformer))["x0"]
    for spec in (
        {"name": "step_cache", "config": {"threshold": 0.0}},
        {"name": "step_cache", "kind": "taylorseer", "config": {"disable_cache_before_step": 99}},
    ):
        found = rows(recipe(transformer, spec))
        np.testing.assert_array_equal(found["x0"], plain)
        assert "work" not in found


CACHES = [
    {"name": "step_cache", "config": {"threshold": 10.0}},
    {"name": "step_cache", "kind": "taylorseer", "config": {"cache_interval": 3}},
    {"name": "step_cache", "kind": "pyramid"},
    {"name": "ras"},
]


@pytest.mark.parametrize("spec", CACHES, ids=str)
def test_caches_save_work_and_leave_nothing_behind(transformer, spec):
    made = recipe(transformer, spec)
    found = rows(made)
    assert (found["nfe"] == 8).all() and (found["work"] < 7.5).all()
    assert distance(made, found).mean() > 0
    np.testing.assert_array_equal(rows(made)["x0"], found["x0"])  # a new batch begins with nothing remembered
    network = load_model(made).network
    assert not any(hasattr(module, "_diffusers_hook") or module._forward_hooks for module in network.modules())


def test_a_first_block_cache_that_always_hits_costs_one_whole_evaluation_and_first_blocks(transformer):
    found = rows(recipe(transformer, {"name": "step_cache", "config": {"threshold": 1e9}}))
    blocks = 1 - rows_share(transformer)
    assert found["work"][0] == pytest.approx(1 + 7 * blocks, abs=0.05)


def rows_share(spec):
    """The share of five of six blocks, roughly: all linear layers of a block against those of the network."""
    net = registry.models.build(spec).skeleton
    inside = [m for b in net.transformer_blocks[1:] for m in b.modules() if isinstance(m, torch.nn.Linear)]
    tokens = {id(m): 16 for b in net.transformer_blocks for m in [*b.attn1.modules(), *b.ff.modules()]}
    tokens[id(net.pos_embed.proj)] = tokens[id(net.proj_out_2)] = 16
    cost = lambda m: m.weight.numel() * tokens.get(id(m), 1)  # noqa: E731
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return sum(map(cost, inside)) / sum(map(cost, layers))


def test_guided_caches_keep_evaluations_with_and_without_labels_apart(transformer):
    spec = ["cfg", {"name": "step_cache", "kind": "taylorseer", "config": {"cache_interval": 2}}]
    made = recipe(transformer, spec)
    found = rows(made)
    assert (found["nfe"] == 16).all() and (found["work"] < 15).all()
    assert made.companion({"name": "acceleration_distance"}).guidance["name"] == "cfg"
    # A scale of 1 is the conditional model: what the other branch remembered must not leak into it.
    alone = rows(recipe(transformer, spec[1]))["x0"]
    one = rows(recipe(transformer, [{"name": "cfg", "scale": 1.0}, spec[1]]))["x0"]
    np.testing.assert_allclose(one, alone, atol=1e-5)


# --- regions ---------------------------------------------------------------------------------------------------------


def test_all_tokens_are_the_network_itself(transformer):
    model = load_model(recipe(transformer))
    x, time, labels = torch.randn(3, 1, 8, 8), torch.tensor([3.0, 500.0, 999.0]), torch.tensor([1, 10, 4])
    with torch.no_grad():
        found, cache = dit.tokens(model.network, x, time, labels, None, None)
        expected = model.network(x, time, labels).sample
        torch.testing.assert_close(dit.image(model.network, found), expected, atol=1e-5, rtol=1e-5)
        some = torch.tensor([[0, 5], [3, 2], [15, 1]])  # from the same state, left-out tokens change nothing
        part, _ = dit.tokens(model.network, x, time, labels, some, cache)
    torch.testing.assert_close(part, torch.take_along_dim(found, some[:, :, None], 1), atol=1e-5, rtol=1e-5)


def test_regions_of_all_tokens_are_the_model_and_of_half_cost_about_half(transformer):
    plain = rows(recipe(transformer))["x0"]
    np.testing.assert_allclose(rows(recipe(transformer, {"name": "ras", "ratio": 1.0}))["x0"], plain, atol=1e-4)
    found = rows(recipe(transformer, {"name": "ras", "start": 2, "every": 0}))
    assert 2 + 0.45 * 6 < found["work"][0] < 2 + 0.65 * 6


# --- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Linear(16, 12), torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)],
    ids=["linear", "conv"],
)
def test_layers_on_integers_are_what_rounded_numbers_give(layer):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8) if isinstance(layer, torch.nn.Conv2d) else torch.randn(5, 16)
    scale, zero = best_range(x.flatten())
    rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
    weight = layer.weight.detach()
    steps = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.dim() - 1)) / 127
    exact = torch.func.functional_call(layer, {"weight": torch.round(weight / steps) * steps}, (rounded,))
    torch.testing.assert_close(integer(layer, scale, int(zero))(x), exact.detach(), atol=1e-4, rtol=1e-4)


def test_the_best_range_beats_the_full_one_on_outliers():
    values = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([12.0])])
    scale, zero = best_range(values)
    assert scale < 0.95 * (12 - float(values.min())) / 255 and float(zero).is_integer()


def test_quantised_rows_stay_near_and_ranges_are_found_once_for_a_chain_too():
    for spec in ({"name": "int8", "num_samples": 16}, [{"name": "int8", "num_samples": 16, "groups": 3}, "cfg"]):
        made = recipe(guidance=spec)
        assert [c.place for c in made.calibrations] == ["guidance"]
        found = rows(made)
        assert (found["nfe"] == made.nfe).all() and 0 < distance(made, found).mean() < 0.3
        network = load_model(made).network
        assert not any("forward" in module.__dict__ for module in network.modules())


def test_a_study_says_what_savings_saved_and_what_they_changed(tmp_path):
    from dashboards.report import cost
    from dashboards.report.study import open_view
    from orchestrator.api import run

    root, common = (
        f"root={tmp_path}",
        ["model=digits_dit", "solver=dpmpp_2m", "nfe=12", "num_samples=32", "batch_size=16"],
    )
    space = "search.space={guidance.config.threshold:[0.0,0.3]}"
    found = run(
        *common,
        root,
        "guidance=step_cache",
        "guidance.config={threshold: 0.1}",
        "metrics=[acceleration]",
        "search=grid",
        space,
        "tracker=none",
    )
    none, some = found.trials().to_pylist()
    assert none["value/cost/work"] == none["value/cost/nfe"] == some["value/cost/nfe"] == 12
    assert 0 < some["value/cost/work"] < 12 and some["value/quality/acceleration_distance"] > 0
    plain = run(*common, root, "name=plain", "metrics=[]", "tracker=none").trials().to_pylist()[0]
    for row in (none, some):  # the companion rows are those of the plain study, seconds and all
        assert row["cost/speedup"] == pytest.approx(plain["cost/generate_s"] / row["cost/generate_s"])
    assert plain.get("cost/speedup") is None
    (table,) = [t for t in cost.section(open_view(str(tmp_path), found.name))[0].tables if t.name == "savings"]
    assert [row[table.head.index("work")] for row in table.rows] == [12, some["value/cost/work"]]


# --- one more step ---------------------------------------------------------------------------------------------------


def test_one_more_step_begins_at_the_mean_of_the_label_with_the_noise_of_the_prior():
    made = recipe(guidance="cfg", initial="one_more_step")
    found = rows(made)
    assert made.nfe == 17 and (found["nfe"] == 17).all()
    images, labels = made.parts.model.reference()
    net = side_network.load(None, torch.device("cpu"))
    z = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for label in (0, 7):
        mean = torch.from_numpy(images[labels == label].mean(axis=0))
        off = (-net(z, torch.full((200,), label)) - mean).mean(dim=0)
        assert float(off.square().mean().sqrt()) < 0.1 < float(mean.square().mean().sqrt())


# --- refusals --------------------------------------------------------------------------------------------------------


def refusals(dit_model):
    heun, sada = "heun", {"hooks": [{"name": "sada"}]}
    return [
        (recipe("digits", "step_cache"), "hooks into the blocks of a transformer, but model digits is none"),
        (
            recipe("digits", "ras"),
            "leaves out tokens of a DiTTransformer2DModel or an SD3Transformer2DModel, but model dig",
        ),
        (recipe(dit_model, "ras", heun), "solver heun asks more than once a step"),
        (recipe(dit_model, "step_cache", strategy="best_of_n", reward="ink"), "strategy best_of_n asks for other"),
        (recipe(dit_model, {"name": "step_cache", "config": {"treshold": 1.0}}), "did you mean 'threshold'"),
        (recipe("gmm", "int8"), "model gmm is none"),
        (recipe(solver={"name": "unified", "preset": "dpmpp_2s"} | sada), "steps of several"),
        (recipe(solver=SADA, guidance="cfgpp"), "guidance cfgpp cannot follow"),
        (recipe(solver=SADA, strategy="best_of_n", reward="ink"), "strategy best_of_n cannot plan"),
        (tokenwise("digits"), "model digits is no DiTTransformer2DModel"),
        (tokenwise(dit_model, guidance="pag"), "guidance pag asks the network in other ways"),
        (tokenwise(dit_model, guidance={"name": "cfg", "sigma_low": 0.1, "sigma_high": 2.0}), "the interval of"),
        (recipe("gmm", initial="one_more_step"), "model gmm has shape"),
    ]


def test_what_saves_nothing_here_is_refused_when_planning(transformer):
    for made, message in refusals(transformer):
        with pytest.raises(ValueError, match=message):
            made.check()
    with pytest.raises(ValueError, match="this recipe has none"):
        recipe().companion({"name": "acceleration_distance"})
    with pytest.raises(ValueError, match="can be combined with one of"):
        registry.guidance.build({"name": "chain", "parts": [{"name": "ras"}, {"name": "pag"}]})
    with pytest.raises(ValueError, match="did you mean 'taylorseer'"):
        registry.guidance.build({"name": "step_cache", "kind": "taylor_seer"})


def test_branches_forget_a_state_that_was_changed_in_place():
    calls = []

    class Model:
        def denoise(self, x, t, cond):
            calls.append(t)
            return x + 1

    x, shared = torch.zeros(2), Branches(Model())
    shared.denoise(x, 0.5, None)
    shared.denoise(x, 0.5, None)
    assert calls == [0.5]
    x += 1
    assert torch.equal(shared.denoise(x, 0.5, None), x + 1) and len(calls) == 2
