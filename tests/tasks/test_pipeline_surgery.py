"""What changes a network between two evaluations works on saved pipelines as on the embedded models."""

import inspect

import numpy as np
import pytest
import torch

from tasks import dit, mmdit, savings
from tasks.recipe import Recipe
from tasks.run import generate
from tests.tasks import tiny_pipelines as tiny
from tests.tasks.test_pipelines import EULER, FLOW, PNDM, assert_equal_images, images, noise_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

STEPS, ROWS = 6, 4
TEXT = ("stable_diffusion", "sdxl", "sd3", "flux", "pixart")


@pytest.fixture
def recipe_of(saved, prompt_file):
    """A recipe on a tiny pipeline."""

    def make(family, guidance=None, **more):
        _, folder = saved(family, **({"classes": 4} if family == "ddpm" else {}))
        model = {"name": "diffusers", "path": folder} | ({"prompts": prompt_file} if family in TEXT else {})
        made = Recipe(
            model=model | more.pop("model", {}),
            solver=more.pop("solver", {"name": "ddim"}),
            times=more.pop("times", {"name": "uniform", "num_steps": STEPS}),
            guidance=guidance or {"name": "none"},
            strategy={"name": "single"},
            batch_size=ROWS,
            **more,
        ).completed()
        made.check()
        return made

    return make


def far(a, b):
    return float(np.abs(a - b).max())


@pytest.mark.parametrize(
    ("family", "kind", "layers", "ours", "solver"),
    [
        ("stable_diffusion", "StableDiffusionPAGPipeline", "mid", (), PNDM),
        ("sdxl", "StableDiffusionXLPAGPipeline", "mid", (), EULER),
        ("sd3", "StableDiffusion3PAGPipeline", "transformer_blocks.0", ("transformer_blocks.0",), FLOW),
    ],
)
def test_perturbed_attention_beside_classifier_free_guidance_equals_diffusers(
    saved, recipe_of, family, kind, layers, ours, solver
):
    import diffusers

    stock, _ = saved(family)
    takes = inspect.signature(getattr(diffusers, kind)).parameters
    parts = {name: part for name, part in stock.components.items() if name in takes}
    pipe = getattr(diffusers, kind)(**parts, pag_applied_layers=[layers])
    pipe.set_progress_bar_config(disable=True)
    parts = [{"name": "cfg", "scale": 2.5}, {"name": "pag", "scale": 1.5, "layers": ours}]
    solver = solver | ({"config": {"shift": 3.0}} if family == "sd3" else {})
    made = recipe_of(
        family, {"name": "chain", "parts": parts}, solver=solver, times={"name": "stock", "num_steps": STEPS}
    )
    found = pipe(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=2.5, pag_scale=1.5,
        output_type="pt",
    )  # fmt: skip
    assert_equal_images(images(made), found.images)
    without = images(made.override({"guidance.parts": [parts[0]]}))
    assert far(images(made), without) > 1e-3


CACHED = {
    "first_block": ("flux", "pixart"),
    "taylorseer": ("sd3", "flux", "pixart", "dit"),
    "pyramid": ("sd3", "flux", "pixart", "dit"),
}
EXACT = {"first_block": {"threshold": 0.0}, "taylorseer": {"cache_interval": 1}}
SPARED = {
    "first_block": {"threshold": 10.0},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 1},
    "pyramid": {},
}


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in CACHED for family in CACHED[kind]])
def test_steps_are_cached_on_every_transformer(recipe_of, kind, family):
    plain = generate(recipe_of(family), 0, ROWS)
    cached = generate(recipe_of(family, {"name": "step_cache", "kind": kind, "config": SPARED[kind]}), 0, ROWS)
    assert cached["work"].max() < STEPS and (cached["nfe"] == STEPS).all()
    assert 0 < far(plain["x0"], cached["x0"]) < 1.0
    if kind in EXACT:
        exact = generate(recipe_of(family, {"name": "step_cache", "kind": kind, "config": EXACT[kind]}), 0, ROWS)
        assert far(plain["x0"], exact["x0"]) < 1e-5


def test_a_cache_beside_classifier_free_guidance_keeps_the_branches_apart(recipe_of):
    cache = {"name": "step_cache", "kind": "taylorseer", "config": {"cache_interval": 1}}
    cfg = {"name": "cfg", "scale": 3.0}
    plain = generate(recipe_of("pixart", cfg), 0, ROWS)["x0"]
    both = generate(recipe_of("pixart", {"name": "chain", "parts": [cache, cfg]}), 0, ROWS)["x0"]
    assert far(plain, both) < 1e-5


@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_regions_of_a_transformer_on_latents(recipe_of, family):
    plain = generate(recipe_of(family), 0, ROWS)
    whole = generate(recipe_of(family, {"name": "ras", "ratio": 1.0}), 0, ROWS)
    some = generate(recipe_of(family, {"name": "ras", "ratio": 0.5, "start": 2}), 0, ROWS)
    assert far(plain["x0"], whole["x0"]) < 1e-5
    assert 0 < far(plain["x0"], some["x0"]) < 1.0 and some["work"].max() < STEPS


def test_regions_beside_classifier_free_guidance_keep_the_branches_apart(recipe_of):
    cfg = {"name": "cfg", "scale": 3.0}
    plain = generate(recipe_of("sd3", cfg), 0, ROWS)["x0"]
    both = generate(recipe_of("sd3", {"name": "chain", "parts": [{"name": "ras", "ratio": 1.0}, cfg]}), 0, ROWS)["x0"]
    assert far(plain, both) < 1e-5


@pytest.mark.parametrize("more", [{}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}])
def test_some_tokens_of_a_joint_transformer_are_those_of_all_where_nothing_moved(more):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, **more,
    ).eval()  # fmt: skip
    x, time = torch.randn(2, 4, 6, 8), torch.tensor([300.0, 700.0])
    given = torch.randn(2, 5, 12), torch.randn(2, 10)
    with torch.no_grad():
        expected = network(x, given[0], given[1], time, return_dict=False)[0]
        twin_ = savings.twin(network)
        found, cache = mmdit.tokens(twin_, x, time, *given, None, None)
        torch.testing.assert_close(mmdit.image(twin_, found, 6, 8), expected, rtol=1e-5, atol=1e-5)
        some = torch.tensor([[0, 7, 3], [11, 2, 5]])
        part, _ = mmdit.tokens(twin_, x, time, *given, some, cache)
        torch.testing.assert_close(part, dit.pick(found, some), rtol=1e-5, atol=1e-5)
        # A token that moved is seen by the others only where it is computed.
        moved = x.clone()
        moved[:, :, :2, :2] += 1.0
        fresh, _ = mmdit.tokens(twin_, moved, time, *given, torch.tensor([[5], [5]]), cache)
        torch.testing.assert_close(fresh[1], found[1, 5:6], rtol=1e-5, atol=1e-5)
        again = network(x, given[0], given[1], time, return_dict=False)[0]
    torch.testing.assert_close(again, expected, rtol=0, atol=0)  # the network itself has its own processors


def test_tokens_of_a_transformer_on_latents_that_stand_still_are_left_out(recipe_of):
    hook = {"name": "sada", "max_token_skips": 2, "max_skips": 0, "start": 0.2, "stop": 1.0}
    solver = {"name": "unified", "preset": "ddim", "hooks": [hook]}
    times = {"name": "uniform", "num_steps": 12}
    plain = generate(recipe_of("dit", times=times), 0, ROWS)
    pruned = generate(recipe_of("dit", times=times, solver=solver), 0, ROWS)
    assert pruned["work"].max() < 12 and 0 < far(plain["x0"], pruned["x0"]) < 1.0


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "ddpm"])
def test_skips_of_a_unet_are_scaled(recipe_of, family):
    plain = generate(recipe_of(family), 0, ROWS)["x0"]
    same = generate(recipe_of(family, {"name": "skip_tuning", "bottom": 1.0, "top": 1.0}), 0, ROWS)["x0"]
    tuned = generate(recipe_of(family, {"name": "skip_tuning", "bottom": 0.5}), 0, ROWS)["x0"]
    assert np.array_equal(plain, same) and far(plain, tuned) > 1e-4


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "pixart", "dit", "ddpm"])
def test_blocks_are_left_out_by_a_schedule_and_by_autoguidance(recipe_of, family):
    made = recipe_of(family)
    blocks = made.parts.model.blocks
    assert len(blocks.names) >= 1 and all(0 < saving < 1 for saving in blocks.savings)
    plain = generate(made, 0, ROWS)
    guided = generate(recipe_of(family, {"name": "autoguidance", "scale": 1.5, "skip": 1}), 0, ROWS)
    assert far(plain["x0"], guided["x0"]) > 1e-4
    assert guided["work"][0] == pytest.approx(STEPS * (2 - blocks.savings[0]), rel=1e-6)
    steps = [{"skip": 0}] * (STEPS - 2) + [{"skip": 1}] * 2
    skipped = generate(recipe_of(family, solver={"name": "unified", "steps": steps}), 0, ROWS)
    assert skipped["work"][0] == pytest.approx(STEPS - 2 * blocks.savings[0], rel=1e-6)


@pytest.mark.parametrize("family", ["stable_diffusion", "dit"])
def test_layers_run_on_integers(recipe_of, family):
    plain = generate(recipe_of(family), 0, ROWS)["x0"]
    found = generate(recipe_of(family, {"name": "int8", "num_samples": 8}), 0, ROWS)["x0"]
    assert 0 < np.abs(plain - found).mean() < 0.1


@pytest.mark.parametrize(
    ("family", "guidance", "model", "why"),
    [
        ("stable_diffusion", {"name": "step_cache"}, {}, "blocks of a transformer"),
        ("flux", {"name": "ras"}, {}, "DiTTransformer2DModel or an SD3Transformer2DModel"),
        ("sd3", {"name": "step_cache"}, {}, "has 1 in all"),
        ("flux", {"name": "skip_tuning"}, {}, "skip connections of a UNet"),
        ("flux", {"name": "autoguidance"}, {}, "has 0 blocks"),
        ("dit", {"name": "deediff"}, {}, "has probes of a network with revision"),
        ("stable_diffusion", {"name": "pag"}, {"compile": True}, "Set model.compile=false"),
        ("stable_diffusion", {"name": "pag", "layers": ["nowhere"]}, {}, "no self-attention layer 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused_when_planning(recipe_of, family, guidance, model, why):
    with pytest.raises(ValueError, match=why):
        recipe_of(family, guidance, model=model)


def test_a_bad_version_is_told_the_same_prompts(recipe_of, saved, tmp_path):
    _, folder = saved("stable_diffusion")
    other = tmp_path / "other.txt"
    other.write_text("a\nb\nc\nd\n")
    for prompts in (None, str(other)):
        bad = {"name": "diffusers", "path": folder, "prompts": prompts}
        with pytest.raises(ValueError, match=r"the same prompts.*Set guidance.bad.prompts="):
            recipe_of("stable_diffusion", {"name": "autoguidance", "bad": bad})


def test_the_skeleton_has_no_numbers_and_every_layer(recipe_of):
    for family in (*TEXT, "dit", "ddpm"):
        made = recipe_of(family)
        mine, real = made.parts.model.skeleton, made.parts.model.load("cpu").network
        assert all(p.device == torch.device("meta") for p in mine.parameters())
        assert [n for n, _ in mine.named_modules()] == [n for n, _ in real.named_modules()]


# --- gradients of rewards through the decoder ------------------------------------------------------------------------


def test_the_gradient_of_a_reward_goes_through_the_decoder_and_the_network(recipe_of):
    made = recipe_of("stable_diffusion", {"name": "reward_gradient", "scale": 1.0, "reward": {"name": "ink"}})
    model, guidance = made.parts.model.load("cpu"), made.parts.guidance
    x, cond, t = noise_of(made), torch.arange(ROWS), 0.5
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def reward(at):
        with torch.no_grad():
            return guidance.scorer(model.decode(model.denoise(at, t, cond)), cond).double()

    moved = guidance.wrap(model).denoise(x, t, cond) - model.denoise(x, t, cond)
    gradient = moved * model.process.alpha(t) / model.process.sigma(t) ** 2
    step = 0.02
    slope = (reward(x + step * towards) - reward(x - step * towards)) / (2 * step)
    torch.testing.assert_close((gradient * towards).flatten(1).sum(1).double(), slope, rtol=0.03, atol=1e-4)
    assert slope.abs().max() > 1e-3


def test_a_reward_that_reads_prompts_guides_every_row_by_its_own(recipe_of):
    from tests.tasks import tiny_weights

    reward = {"name": "pick_score", "path": str(tiny_weights.clip())}
    made = recipe_of("stable_diffusion", {"name": "reward_gradient", "scale": 50.0, "reward": reward})
    found = generate(made, 0, ROWS)
    assert (found["decodes"] == STEPS).all() and made.account.decodes == STEPS
    plain = generate(recipe_of("stable_diffusion"), 0, ROWS)
    assert far(plain["x0"], found["x0"]) > 1e-3 and (plain["decodes"] == 0).all()
    scorer = made.scorer(reward)
    labels = torch.from_numpy(found["label"])
    before, after = (scorer(torch.from_numpy(rows["x0"]), labels).mean() for rows in (plain, found))
    assert after > before
    parts = [{"name": "cfg"}, {"name": "reward_gradient", "reward": reward}]
    beside = recipe_of("stable_diffusion", {"name": "chain", "parts": parts})
    assert beside.account.decodes == STEPS and (generate(beside, 0, ROWS)["decodes"] == STEPS).all()


LIMITED = {"name": "cfg", "sigma_low": 0.5, "sigma_high": 5.0}
GRADIENT = {"name": "reward_gradient"}


@pytest.mark.parametrize(
    "parts",
    [[GRADIENT], [LIMITED, GRADIENT], [GRADIENT, LIMITED], [{"name": "cfg"}, GRADIENT], [GRADIENT, {"name": "cfg"}]],
)
def test_guidance_decodes_as_often_as_was_planned(recipe_of, parts):
    """Guidance of both predictions decodes both, and guidance on an interval asks for one outside of it."""
    made = recipe_of("stable_diffusion", {"name": "chain", "parts": parts})
    found = generate(made, 0, ROWS)
    assert (found["decodes"] == made.account.decodes).all() and made.account.decodes >= STEPS
    assert (found["nfe"] == made.nfe).all()


def test_a_reward_of_pictures_is_asked_for_the_shape_that_is_decoded(recipe_of):
    from tests.tasks import tiny_weights

    aesthetic = {"name": "aesthetic", "path": str(tiny_weights.aesthetic())}
    assert recipe_of("stable_diffusion", {"name": "reward_gradient", "reward": aesthetic}).account.decodes == STEPS
