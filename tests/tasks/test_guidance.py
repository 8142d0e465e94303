"""Guidance: identities with the model it wraps, exact answers, what it costs, what is refused."""

import math

import numpy as np
import pytest
import torch

from tasks import registry
from tasks.attention import identity_maps, self_attentions
from tasks.processes import from_x0
from tasks.recipe import Recipe
from tasks.run import generate, load_model
from tasks.sampler import CountedModel
from tasks.skips import scaled_skips, skips_of

GMM = {"name": "gmm", "labels": True}


def recipe(guidance="none", model="digits", solver="ddim", steps=4, **changes):
    times = {"name": "uniform", "num_steps": steps}
    plain = Recipe(model, solver, times, "none", "single", batch_size=8).completed()
    return plain.override({"guidance": guidance} | changes)


def rows(*args, **changes):
    made = recipe(*args, **changes)
    made.check()
    found = generate(made, 0, 4)
    assert (found["nfe"] == made.nfe).all()
    return found["x0"]


@pytest.fixture(scope="module")
def digits():
    return load_model(recipe())


def ask(model, guidance, t=0.5, counted=False):
    spec = recipe(guidance).guidance
    inner = CountedModel(model, 8)
    x = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = registry.guidance.build(spec).wrap(inner).denoise(x, t, torch.arange(4))
    return (found, inner.rows // 4) if counted else found


# --- the model itself ------------------------------------------------------------------------------------------------

NOTHING = [
    {"name": "pag", "scale": 0.0},
    {"name": "skip_tuning", "bottom": 1.0, "top": 1.0},
    {"name": "skip_tuning", "scales": [1.0] * 4},
    {"name": "autoguidance", "scale": 1.0, "skip": 1},
    {"name": "reward_gradient", "scale": 0.0},
    {"name": "cfg_schedule", "scales": [1.0, 1.0]},
    {"name": "chain"},
    [{"name": "skip_tuning", "bottom": 1.0}, {"name": "pag", "scale": 0.0}, {"name": "cfg_schedule", "scales": [1.0]}],
]


@pytest.mark.parametrize("guidance", NOTHING, ids=str)
def test_guidance_that_does_nothing_is_the_model_bit_for_bit_at_its_cost(guidance):
    made = recipe(guidance)
    assert made.nfe == recipe().nfe
    np.testing.assert_array_equal(rows(guidance), rows())


def test_unguided_scales_give_the_unconditional_model_bit_for_bit(digits):
    nothing = torch.full((4,), 10)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        unconditional = digits.denoise(x, 0.5, nothing)
    for guidance in ({"name": "cfgpp", "scale": 0.0}, {"name": "cfg", "scale": 0.0}):
        assert torch.equal(ask(digits, guidance), unconditional)


def test_equal_scales_at_all_steps_are_plain_guidance_bit_for_bit():
    plain = rows({"name": "cfg", "scale": 2.5})
    np.testing.assert_array_equal(rows({"name": "cfg_schedule", "scales": [2.5] * 4}), plain)
    np.testing.assert_array_equal(rows({"name": "cfg_schedule", "scales": [2.5]}), plain)
    np.testing.assert_array_equal(rows([{"name": "cfg", "scale": 2.5}]), plain)
    np.testing.assert_array_equal(rows({"name": "rescaled_cfg", "scale": 2.5, "rescale": 0.0}), plain)


# --- CFG++ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfgpp_is_ddim_guided_by_a_scale_that_depends_on_the_step(process, eta):
    omega, model = 0.7, GMM | {"process": process}
    solver = {"name": "ddim", "eta": eta}
    made = recipe({"name": "cfgpp", "scale": omega}, model, solver, steps=6, dtype="float64")
    noising, grid = made.parts.model.noising, made.grid[0]
    steps = [1 - math.exp(noising.lam(t) - noising.lam(s)) for t, s in zip(grid, grid[1:], strict=False)]
    if eta:  # the part of the step that noise does not take
        kernel = made.parts.solver.kernel
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        pairs = zip(grid, grid[1:], strict=False)
        steps = [float(kernel(noising, zero, one, t, s)[0]) / noising.alpha(s) for t, s in pairs]
    scales = [omega / step for step in steps]
    same = {"name": "cfg_schedule", "scales": scales}
    np.testing.assert_allclose(
        rows(made.guidance, model, solver, steps=6, dtype="float64"),
        rows(same, model, solver, steps=6, dtype="float64"),
        rtol=1e-9,
        atol=1e-9,
    )


def test_cfgpp_at_scale_zero_is_the_unconditional_model_with_every_solver():
    for solver in ("ddim", "dpmpp_2m", "heun", {"name": "unified", "preset": "unipc"}):
        free = {"name": "cfg", "scale": 0.0}
        np.testing.assert_allclose(
            rows({"name": "cfgpp", "scale": 0.0}, GMM, solver, dtype="float64"),
            rows(free, GMM, solver, dtype="float64"),
            atol=1e-12,
        )


def test_cfgpp_ends_on_the_guided_prediction():
    made = recipe({"name": "cfgpp", "scale": 0.6}, GMM, "dpmpp_2m", steps=1, dtype="float64")
    expected = recipe({"name": "cfg", "scale": 0.6}, GMM, "dpmpp_2m", steps=1, dtype="float64")
    np.testing.assert_allclose(generate(made, 0, 4)["x0"], generate(expected, 0, 4)["x0"], atol=1e-12)


# --- perturbed attention, skips --------------------------------------------------------------------------------------


def test_an_identity_map_passes_on_the_projected_values():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=6, heads=2, dim_head=3).eval()
    net = torch.nn.Sequential(layer)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        plain = net(x)
        with identity_maps(net, ("0",)):
            perturbed = net(x)
        torch.testing.assert_close(perturbed, layer.to_out[0](layer.to_v(x)))
        assert torch.equal(net(x), plain) and not torch.equal(plain, perturbed)
        lonely = x[:, :1]  # one token can only attend to itself
        with identity_maps(net, ("0",)):
            torch.testing.assert_close(net(lonely), layer(lonely))


def test_cross_attention_is_left_alone():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        )  # fmt: skip
    names = self_attentions(net)
    assert len(names) == 4 and all(name.endswith("attn1") for name in names)
    assert skips_of(net) == (2, 2)


def test_perturbed_attention_leads_away_from_the_perturbed_prediction(digits):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = torch.arange(4)
    with torch.no_grad():
        plain = digits.denoise(x, 0.5, cond)
        with identity_maps(digits.network, ("mid_block.attentions.0",)):
            perturbed = digits.denoise(x, 0.5, cond)
    assert not torch.equal(plain, perturbed)
    found, cost = ask(digits, {"name": "pag", "scale": 2.0}, counted=True)
    torch.testing.assert_close(found, plain + 2.0 * (plain - perturbed))
    assert cost == 2


def test_scaled_skips_multiply_what_is_concatenated_from_the_deepest_on(digits):
    net, seen = digits.network, []
    hooks = [b.register_forward_pre_hook(lambda m, a: seen.append(a[1])) for b in net.up_blocks]
    x, cond = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    try:
        with torch.no_grad():
            digits.denoise(x, 0.5, cond)
    finally:
        for hook in hooks:
            hook.remove()
    plain = [skip for block in seen for skip in reversed(block)]
    assert skips_of(net) == (2, 2) and len(plain) == 4
    seen.clear()
    with torch.no_grad(), scaled_skips(net, (0.5, 1.0, 2.0, 1.0)):
        hooks = [b.register_forward_pre_hook(lambda m, a: seen.append(a[1])) for b in net.up_blocks]
        digits.denoise(x, 0.5, cond)
        for hook in hooks:
            hook.remove()
    scaled = [skip for block in seen for skip in reversed(block)]
    torch.testing.assert_close(scaled[0], 0.5 * plain[0])
    assert torch.equal(scaled[1], plain[1]) and torch.equal(scaled[3], plain[3])
    torch.testing.assert_close(scaled[2], 2.0 * plain[2])


# --- other directions ------------------------------------------------------------------------------------------------


def test_a_rescaled_prediction_has_the_spread_of_the_conditional_one(digits):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    alpha, sigma = digits.process.alpha(0.5), digits.process.sigma(0.5)
    with torch.no_grad():
        like = from_x0("epsilon", x, digits.denoise(x, 0.5, torch.arange(4)), alpha, sigma)
    found = from_x0("epsilon", x, ask(digits, {"name": "rescaled_cfg", "scale": 4.0, "rescale": 1.0}), alpha, sigma)
    torch.testing.assert_close(found.flatten(1).std(dim=1), like.flatten(1).std(dim=1))
    plain = from_x0("epsilon", x, ask(digits, {"name": "cfg", "scale": 4.0}), alpha, sigma)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), plain.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))


def test_scales_between_knots_are_interpolated_and_all_evaluations_of_a_step_have_one():
    plugin = registry.guidance.build({"name": "cfg_schedule", "scales": [1.0, 3.0]})
    assert plugin.on_grid(3) == (1.0, 2.0, 3.0) and plugin.on_grid(2) == (1.0, 3.0)
    made = recipe({"name": "cfg_schedule", "scales": [1.0, 2.0, 1.0, 2.0]}, GMM, "heun")
    # Heun asks twice a step, once in the last: 2 unguided, 4 guided, 2 unguided, 2 guided.
    assert made.nfe == 10 and (generate(made, 0, 2)["nfe"] == 10).all()


def test_autoguidance_extrapolates_away_from_the_bad_model():
    bad = GMM | {"seed": 3} if "seed" in registry.models.defaults("gmm") else GMM | {"scale": 1.5}
    spec = {"name": "autoguidance", "scale": 3.0, "bad": bad}
    made = recipe(spec, GMM, dtype="float64")
    made.check()
    good, worse = load_model(made), registry.models.build(bad).load("cpu")
    x, cond = torch.randn(4, *good.shape, dtype=torch.float64), torch.arange(4) % good.num_classes
    inner = CountedModel(good, 8)
    found = made.parts.guidance.wrap(inner).denoise(x, 0.5, cond)
    g, b = good.denoise(x, 0.5, cond), worse.denoise(x, 0.5, cond)
    torch.testing.assert_close(found, b + 3.0 * (g - b))
    assert inner.rows == 8 and made.nfe == 8


def test_autoguidance_by_left_out_blocks_counts_their_work():
    made = recipe({"name": "autoguidance", "skip": 5})
    made.check()
    found = generate(made, 0, 4)
    share = made.parts.model.blocks.share(5)
    np.testing.assert_allclose(found["work"], 4 * (1 + share))
    assert (found["nfe"] == 8).all()


ONE = {"name": "gmm", "means": [[0.5, -0.3]], "weights": [1.0], "covariances": [[[0.5, 0.2], [0.2, 0.8]]]}


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_reward_gradients_are_exact_for_a_linear_reward_on_a_gaussian(t):
    slope, covariance = 0.7, torch.tensor(ONE["covariances"][0])
    moved = torch.tensor(ONE["means"][0]) + slope * covariance.sum(dim=1)
    tilted = registry.models.build(ONE | {"means": [moved.tolist()]}).load("cpu")
    spec = {"name": "reward_gradient", "reward": {"name": "linear", "slope": slope}}
    model = registry.models.build(ONE).load("cpu")
    x = torch.randn(5, 2, dtype=torch.float64)
    found = registry.guidance.build(spec).wrap(model).denoise(x, t, None)
    torch.testing.assert_close(found, tilted.denoise(x, t, None), atol=1e-6, rtol=1e-6)


def test_the_bias_for_a_quadratic_reward_is_the_documented_factor():
    variance, q, center, t = 0.6, 2.0, 1.5, 0.4
    one = {"name": "gmm", "means": [[0.2]], "weights": [1.0], "covariances": [[[variance]]]}
    model = registry.models.build(one).load("cpu")
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    posterior = variance * sigma**2 / (alpha**2 * variance + sigma**2)
    x = torch.randn(5, 1, dtype=torch.float64)
    plain = model.denoise(x, t, None)
    spec = {"name": "reward_gradient", "reward": {"name": "quadratic", "center": center, "q": q}}
    found = registry.guidance.build(spec).wrap(model).denoise(x, t, None)
    torch.testing.assert_close(found, plain + posterior * (center - plain) / q, atol=1e-6, rtol=1e-6)
    exact = plain + posterior * (center - plain) / (q + posterior)
    torch.testing.assert_close((found - plain) / (exact - plain), torch.full_like(x, 1 + posterior / q))


def test_a_reward_gradient_counts_its_backward_passes():
    made = recipe({"name": "reward_gradient", "scale": 0.1})
    made.check()
    assert made.nfe == 4 and made.account.gradients == 4
    assert rows({"name": "reward_gradient", "scale": 20.0, "reward": {"name": "ink"}}).mean() > rows().mean()


# --- together --------------------------------------------------------------------------------------------------------


def test_parts_of_a_chain_add_their_directions_and_share_evaluations(digits):
    cfg, pag = {"name": "cfg", "scale": 3.0}, {"name": "pag", "scale": 2.0}
    both, cost = ask(digits, [cfg, pag], counted=True)
    assert cost == recipe([cfg, pag]).parts.guidance.evaluations == 3
    plain = ask(digits, "none")
    torch.testing.assert_close(both, ask(digits, cfg) + ask(digits, pag) - plain)
    tuned = {"name": "skip_tuning", "bottom": 0.8}
    found, cost = ask(digits, [cfg, tuned, pag], counted=True)
    assert cost == 3
    torch.testing.assert_close(
        found, ask(digits, [cfg, tuned]) + ask(digits, [tuned, pag]) - ask(digits, tuned), atol=1e-5, rtol=1e-5
    )


def test_a_chain_costs_what_was_planned_with_an_interval_or_a_schedule_in_it():
    for part in ({"name": "cfg", "sigma_low": 0.5}, {"name": "cfg_schedule", "scales": [1.0, 2.0, 0.0, 2.0]}):
        made = recipe([part, "pag"])
        found = generate(made, 0, 4)
        assert (found["nfe"] == made.nfe).all() and made.nfe in (10, 11, 12)


def test_values_inside_of_a_chain_are_reached_by_number():
    made = recipe(["cfg", "pag"]).override({"guidance.parts.1.scale": 1.25})
    assert made.guidance["parts"][1] == {"name": "pag", "scale": 1.25, "layers": []}
    assert recipe({"name": "cfg_schedule"}).override({"guidance.scales.0": 4.0}).guidance["scales"][0] == 4.0


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "pag without a network": (["pag", GMM], "model gmm is none"),
    "pag, no such layer": ([{"name": "pag", "layers": ["nowhere"]}], "no self-attention layer 'nowhere'. Layers: down"),
    "skip-tuning without skips": (["skip_tuning", GMM], "model gmm has none"),
    "skip-tuning, wrong count": ([{"name": "skip_tuning", "scales": [1.0]}], "must be 4 numbers"),
    "cfg++ needs labels": (["cfgpp", "gmm"], "guidance cfgpp needs labels"),
    "cfg++ and a strategy": (
        [{"name": "cfgpp"}, "digits", {"name": "ddim", "eta": 1.0}, 4, {"strategy": "fk_steering", "reward": "ink"}],
        "strategy fk_steering evaluates the network outside",
    ),
    "autoguidance, another shape": ([{"name": "autoguidance", "bad": GMM}], "guidance.bad has process"),
    "autoguidance, no blocks": ([{"name": "autoguidance", "skip": 1}, GMM], "model gmm has none"),
    "autoguidance, too many blocks": ([{"name": "autoguidance", "skip": 2**40}], "leaves out block 40"),
    "no gradients": (
        [{"name": "reward_gradient", "reward": {"name": "jpeg_compressibility"}}],
        "jpeg_compressibility passes no gradients to its samples. Use one of: .*ink",
    ),
    "measurements": ([{"name": "reward_gradient", "reward": {"name": "measurement"}}], "depends on the row"),
    "labels that are taken away": (
        [[{"name": "reward_gradient", "reward": {"name": "class_log_prob"}}, {"name": "cfg"}]],
        "guidance.parts has cfg after reward_gradient, .*reward class_log_prob needs them. Put reward_gradient last",
    ),
    "a schedule and travel": (
        ["cfg_schedule", "digits", "ddim", 4, {"times": "travel"}],
        "come back to the same level",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_guided_is_refused_when_planning(case):
    arguments, message = REFUSED[case]
    *positional, changes = arguments if isinstance(arguments[-1], dict) and len(arguments) == 5 else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        recipe(*positional, **changes).check()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "cfgpp", "scale": 1.5}, "scale of cfgpp must be between 0 and 1, got 1.5"),
        ({"name": "rescaled_cfg", "rescale": 2.0}, "rescale must be between 0 and 1, got 2.0"),
        ({"name": "rescaled_cfg", "prediction": "eps"}, "did you mean 'epsilon'|Allowed: epsilon"),
        ({"name": "cfg_schedule", "scales": []}, "at least one number"),
        ({"name": "autoguidance", "skip": 0}, "needs a bad version"),
        ({"name": "chain", "parts": [{"name": "cfgpp"}, {"name": "pag"}]}, "must be the last of guidance.parts"),
        ({"name": "chain", "parts": [{"name": "chain"}]}, "List its parts instead"),
        ({"name": "chain", "parts": [{"name": "cgf"}]}, "did you mean 'cfg'"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.guidance.build(spec)
