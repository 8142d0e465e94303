"""Pipelines in our sampling loop: the stock pipelines' images, prompts, options and refusals."""

import json
import math
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import registry, run, vocabulary
from tasks.noise import RowNoise
from tasks.pipelines import decoder, hub
from tasks.pipelines.memory import Portions
from tasks.pipelines.texts import Texts
from tasks.recipe import Recipe
from tasks.run import generate
from tests.tasks import tiny_pipelines as tiny

# numpy's word to a stock scheduler that hands it a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

STEPS, SCALE, ROWS = 3, 2.5, 4


def diffusers_ddim():
    from diffusers import DDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(clip_sample=False, **betas)


def recipe(folder, prompts=None, guidance=SCALE, **more):
    spec = {"name": "diffusers", "path": folder} | ({"prompts": prompts} if prompts else {})
    spec |= more.pop("model", {})
    made = Recipe(
        model=spec,
        solver=more.pop("solver", {"name": "diffusers", "scheduler": "DDIMScheduler"}),
        times=more.pop("times", {"name": "stock", "num_steps": STEPS}),
        guidance={"name": "cfg", "scale": guidance} if guidance else {"name": "none"},
        strategy={"name": "single"},
        batch_size=more.pop("batch_size", ROWS),
        **more,
    ).completed()
    made.check()
    return made


def noise_of(made):
    """The starting noise of the rows, as the study draws it, in the stock pipeline's units."""
    rows = RowNoise(made.seed, torch.arange(ROWS), dtype=torch.float32)
    return rows.at(-1).normal(made.parts.model.shape, purpose="prior")


def images(made, rows=ROWS):
    return generate(made, 0, rows)["x0"]


def assert_equal_images(ours, stock, tolerance=1e-4):
    theirs = np.asarray(torch.as_tensor(stock)) * 2 - 1
    assert ours.shape == theirs.shape
    assert ours.std() > 0.05  # not a grey card
    assert np.abs(ours - theirs).max() < tolerance


PNDM = {"name": "diffusers", "scheduler": "PNDMScheduler", "config": {"skip_prk_steps": True, "steps_offset": 1}}
PNDM["config"]["set_alpha_to_one"] = False
EULER = {"name": "diffusers", "scheduler": "EulerDiscreteScheduler"}
EULER["config"] = {"steps_offset": 1, "timestep_spacing": "leading"}
DDIM = {"name": "diffusers", "scheduler": "DDIMScheduler"}
DDIM["config"] = {"clip_sample": False, "steps_offset": 0, "set_alpha_to_one": True}  # as diffusers_ddim()
PRESETS = Path(__file__).resolve().parents[2] / "configs" / "preset"
FLOW = {"name": "diffusers", "scheduler": "FlowMatchEulerDiscreteScheduler"}
STOCK, UNIFORM = {"name": "stock", "num_steps": STEPS}, {"name": "uniform", "num_steps": STEPS}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_equals_the_stock_pipeline(saved, prompt_file, prediction):
    stock, folder = saved("stable_diffusion", prediction=prediction)
    made = recipe(folder, prompt_file, solver={"name": "diffusers", "scheduler": "PNDMScheduler"})
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


def test_sdxl_equals_the_stock_pipeline(saved, prompt_file):
    stock, folder = saved("sdxl")
    made = recipe(folder, prompt_file, solver={"name": "diffusers", "scheduler": "EulerDiscreteScheduler"})
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_equals_the_stock_pipeline(saved, prompt_file, with_t5):
    stock, folder = saved("sd3", with_t5=with_t5)
    made = recipe(folder, prompt_file, solver=FLOW)
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


@pytest.mark.parametrize(("guidance_embeds", "shifts"), [(True, True), (False, True), (False, False)])
def test_flux_equals_the_stock_pipeline(saved, prompt_file, guidance_embeds, shifts):
    from tasks.pipelines.families.flux import pack

    stock, folder = saved("flux", guidance_embeds=guidance_embeds, shifts=shifts)
    made = recipe(folder, prompt_file, guidance=None, solver=FLOW, model={"height": 16, "width": 16})
    # Of 16 tokens: the same grid as one of ours.
    shift = math.exp(0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)) if shifts else 1.0
    ours = made.override({"times": {"name": "shifted", "num_steps": STEPS, "shift": shift}})
    np.testing.assert_allclose(made.grid[0], ours.grid[0], atol=1e-6)
    found = stock(
        tiny.PROMPTS, latents=pack(noise_of(made)), num_inference_steps=STEPS, height=16, width=16, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


def test_flux_with_a_scheduler_that_lays_its_own_sigmas_equals_the_stock_pipeline(saved, prompt_file):
    """The stock pipeline hands its sigmas to a class without ``use_flow_sigmas`` alone."""
    from diffusers import UniPCMultistepScheduler

    from tasks.pipelines.families.flux import pack

    stock, folder = saved("flux", guidance_embeds=False, shifts=False)
    solver, steps = {"name": "diffusers", "scheduler": "UniPCMultistepScheduler"}, {"name": "stock", "num_steps": 6}
    model = {"height": 16, "width": 16}
    made = recipe(folder, prompt_file, guidance=None, solver=solver, times=steps, model=model)
    of_flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    before, stock.scheduler = stock.scheduler, UniPCMultistepScheduler.from_config(stock.scheduler.config, **of_flows)
    found = stock(tiny.PROMPTS, latents=pack(noise_of(made)), num_inference_steps=6, output_type="pt", **model)
    stock.scheduler = before
    assert made.parts.solver.handed(made.parts.model.noising, 6) == {}
    assert_equal_images(images(made), found.images)


def test_what_the_stock_pipeline_hands_to_its_scheduler_is_in_the_key(saved, prompt_file, monkeypatch):
    """Its configuration is the class's own, so nothing else tells the two grids apart."""
    from tasks.pipelines.families.flux import Flux

    _, folder = saved("flux", guidance_embeds=False, shifts=False)
    size = {"height": 16, "width": 16}

    def keys():
        made = [recipe(folder, None, None, solver=FLOW, model=size, times=times) for times in (STOCK, UNIFORM)]
        return [each.key for each in made]

    stock, ours = keys()
    monkeypatch.setattr(Flux, "grid_options", lambda *_: {})
    other, same = keys()
    assert stock != other and ours == same  # times of ours enter by their values


def test_flux_with_true_guidance_equals_the_stock_pipeline(saved, prompt_file):
    from tasks.pipelines.families.flux import pack

    stock, folder = saved("flux")
    size = {"height": 16, "width": 16}
    times = {"name": "shifted", "num_steps": STEPS, "shift": math.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256))}
    model = size | {"negative_prompt": "a blur", "embedded_guidance": 2.0}
    made = recipe(folder, prompt_file, solver=FLOW, model=model, times=times)
    found = stock(
        tiny.PROMPTS, negative_prompt=["a blur"] * 4, true_cfg_scale=SCALE, guidance_scale=2.0, **size,
        latents=pack(noise_of(made)), num_inference_steps=STEPS, output_type="pt",
    )  # fmt: skip
    assert_equal_images(images(made), found.images)


def test_pixart_equals_the_stock_pipeline(saved, prompt_file):
    stock, folder = saved("pixart")
    made = recipe(folder, prompt_file, solver={"name": "diffusers", "scheduler": "DPMSolverMultistepScheduler"})
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt",
        clean_caption=False, use_resolution_binning=False,
    )  # fmt: skip
    assert_equal_images(images(made), found.images)


def test_dit_equals_the_stock_pipeline(saved, monkeypatch):
    from diffusers.pipelines.dit import pipeline_dit

    stock, folder = saved("dit")
    made = recipe(folder)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise_of(made))
    found = stock(list(range(ROWS)), guidance_scale=SCALE, num_inference_steps=STEPS, output_type="pt")
    assert_equal_images(images(made), found.images)


def test_ddpm_equals_the_stock_pipeline(saved, monkeypatch):
    from diffusers.pipelines.ddim import pipeline_ddim

    stock, folder = saved("ddpm")
    made = recipe(folder, guidance=None)
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: noise_of(made))
    found = stock(batch_size=ROWS, num_inference_steps=STEPS, output_type="pt")
    assert_equal_images(images(made), found.images)


@pytest.mark.parametrize("name", ["diffusers", "unet"])
def test_a_folder_s_own_scheduler_configuration_is_the_stock_pipeline_s(saved, monkeypatch, name):
    """As a pipeline, and as a folder with a UNet."""
    from diffusers.pipelines.ddim import pipeline_ddim

    stock, folder = saved("ddpm", clip_sample=False, timestep_spacing="trailing")
    made = recipe(folder, guidance=None, model={"name": name})
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: noise_of(made))
    found = stock(batch_size=ROWS, num_inference_steps=STEPS, output_type="pt")
    assert_equal_images(images(made), found.images)
    over = made.override({"solver": made.solver | {"config": {"clip_sample": True, "clip_sample_range": 0.1}}})
    assert np.abs(images(over) - images(made)).max() > 0.1 and over.key != made.key


def test_the_digits_model_as_a_pipeline_is_the_digits_model(tmp_path):
    """Labels, guidance and the label after the last, through the other loader."""
    made = recipe(str(tiny.digits(tmp_path / "digits")), solver={"name": "ddim"}, times={"name": "uniform"})
    plain = made.override({"model": "digits"})
    assert made.parts.model.num_classes == 10
    np.testing.assert_array_equal(images(made), images(plain))


# --- what a pipeline is told -----------------------------------------------------------------------------------------


def test_a_distilled_network_is_told_its_guidance_scale(saved, prompt_file):
    stock, folder = saved("stable_diffusion", time_cond_proj_dim=8)
    stock.scheduler = diffusers_ddim()
    found = {}
    for scale in (None, 8.5, 2.0):
        made = recipe(folder, prompt_file, None, solver=DDIM, model={"embedded_guidance": scale, "distilled": True})
        found[scale] = images(made)
    np.testing.assert_array_equal(found[None], found[8.5])
    assert np.abs(found[2.0] - found[8.5]).max() > 1e-4
    # The stock pipeline switches its own guidance off where the network has the scale as an input.
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "pt"}
    assert_equal_images(found[2.0], stock(tiny.PROMPTS, latents=noise_of(made), **options).images)


def test_a_network_that_predicts_data_minus_noise_is_integrated_forwards(saved, prompt_file):
    """InstaFlow's loop, written out: x <- x + v / N with v at training step 1000 (1 - i / N)."""
    stock, folder = saved("stable_diffusion")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "reversed_flow"}
    times = {"name": "uniform", "num_steps": 2}
    made = recipe(folder, prompt_file, None, model={"scheduler": scheduler}, solver={"name": "euler"}, times=times)
    x = noise_of(made)
    with torch.no_grad():
        embeds, _ = stock.encode_prompt(tiny.PROMPTS, "cpu", 1, False)
        for n in (1000.0, 500.0):
            x = x + stock.unet(x, n, encoder_hidden_states=embeds).sample / 2
        wanted = stock.vae.decode(x / stock.vae.config.scaling_factor).sample.clamp(-1, 1)
    np.testing.assert_allclose(images(made), wanted.numpy(), atol=1e-4)


def test_a_lora_equals_the_stock_pipeline_with_it(saved, prompt_file, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    stock, folder = tiny.stable_diffusion(tmp_path / "base"), str(tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    stock.unet.add_adapter(config)
    layers = get_peft_model_state_dict(stock.unet)
    stock.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, safe_serialization=True)
    stock.unet.delete_adapters("default")
    stock.load_lora_weights(tmp_path / "lora", adapter_name="it")
    stock.set_adapters(["it"], [0.7])
    stock.scheduler = diffusers_ddim()
    lora = {"path": str(tmp_path / "lora"), "scale": 0.7}
    made = recipe(folder, prompt_file, None, solver=DDIM, model={"lora": [lora]})
    without = recipe(folder, prompt_file, None, solver=DDIM)
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}
    ours = images(made)
    assert_equal_images(ours, stock(tiny.PROMPTS, latents=noise_of(made), **options).images)
    assert np.abs(ours - images(without)).max() > 1e-3
    keys = {r.key for r in (made, without, made.override({"model.lora.0.scale": 0.5}))}
    assert len(keys) == 3


# --- options and keys ------------------------------------------------------------------------------------------------


def test_where_things_lie_is_no_part_of_the_key(saved, prompt_file, tmp_path):
    _, folder = saved("stable_diffusion")
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(prompt_file, tmp_path / "others.txt")
    made = recipe(folder, prompt_file)
    assert (
        made.override({"model.path": str(tmp_path / "copy"), "prompts": str(tmp_path / "others.txt")}).key == made.key
    )
    assert made.override({"model.halvings": 0}).key == made.key
    (tmp_path / "others.txt").write_text("another prompt\n")
    changed = [{"prompts": str(tmp_path / "others.txt")}, {"model.dtype": "bfloat16"}, {"model.attention": "math"}]
    changed += [{"model.compile": True}, {"model.channels_last": True}, {"model.decode": "tiled"}]
    assert len({made.key, *(made.override(change).key for change in changed)}) == 7


OPTIONS = [({"attention": "math"}, 1e-5), ({"channels_last": True}, 1e-5), ({"decode": "sliced"}, 1e-5)]
OPTIONS += [({"decode_rows": 3}, 1e-5), ({"dtype": "bfloat16"}, 0.2)]


@pytest.mark.parametrize(("option", "tolerance"), OPTIONS, ids=lambda value: str(value))
def test_an_option_changes_the_images_no_more_than_it_says(saved, prompt_file, option, tolerance):
    _, folder = saved("stable_diffusion")
    plain = images(recipe(folder, prompt_file, solver=DDIM))
    found = images(recipe(folder, prompt_file, solver=DDIM, model=option))
    assert np.abs(found - plain).max() < tolerance


def test_every_solver_and_strategy_sees_an_ordinary_model(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    best = {"name": "best_of_n", "n": 2}
    made = recipe(folder, prompt_file, solver={"name": "dpmpp_2m"}, times={"name": "uniform", "num_steps": 2})
    made = made.override({"strategy": best, "reward": "jpeg_compressibility", "batch_size": 8})
    made.check()
    found = generate(made, 0, 4)
    assert found["x0"].shape == (4, 3, 16, 16)
    assert found["nfe"].tolist() == [8] * 4


# --- decoding in a stage of its own ----------------------------------------------------------------------------------


def test_latents_decoded_apart_are_the_same_images_bit_for_bit_without_the_network(saved, prompt_file, monkeypatch):
    _, folder = saved("stable_diffusion")
    made = recipe(folder, prompt_file, solver=DDIM)
    whole = generate(made, 0, 8)
    pieces = [generate(made, low, high, decoded=False) for low, high in ((0, 3), (3, 8))]
    assert pieces[0]["x0"].shape == (3, 4, 8, 8)
    decoder._decoder.cache_clear()
    monkeypatch.setattr(run, "load", None)  # neither the network nor the encoders
    images = [run.decode(made, start, piece) for start, piece in zip((0, 3), pieces, strict=True)]
    np.testing.assert_array_equal(np.concatenate([piece["x0"] for piece in images]), whole["x0"])
    for name in ("sample_id", "prompt", "nfe"):
        np.testing.assert_array_equal(np.concatenate([piece[name] for piece in images]), whole[name])
    assert all((image["seconds"] > piece["seconds"]).all() for image, piece in zip(images, pieces, strict=True))


def test_an_image_that_the_decoder_spoils_is_an_error(saved, prompt_file):
    made = recipe(saved("stable_diffusion")[1], prompt_file, solver=DDIM)
    found = generate(made, 4, 8, decoded=False)
    found["x0"][2] = np.inf
    with pytest.raises(ValueError, match="sample 6 of .* is not finite"):
        run.decode(made, 4, found)


# --- prompts ---------------------------------------------------------------------------------------------------------


class Shelf(dict):
    """Kept texts in memory."""

    load = dict.get
    save = dict.__setitem__


def test_a_prompt_belongs_to_its_index_and_is_encoded_once_for_all_processes(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    made = recipe(folder, prompt_file, solver=DDIM)
    run.load.cache_clear()
    shelf = Shelf()
    whole = generate(made, 0, 8, texts=shelf)
    assert run.load_model(made).texts.encoded == len(shelf) == 4  # three distinct prompts and the empty one
    run.load.cache_clear()
    parts = [generate(made, 0, 3, texts=shelf), generate(made, 3, 8, texts=shelf)]
    assert run.load_model(made).texts.encoded == 0
    for name in ("x0", "prompt", "prompt_id", "group", "label"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    assert whole["prompt"].tolist() == tiny.PROMPTS * 2
    assert whole["prompt_id"].tolist() == ["0", "1", "2", "3"] * 2


def test_the_columns_of_a_pipeline_s_rows_are_known_when_planning(saved, prompt_file):
    for name, prompts in (("stable_diffusion", prompt_file), ("ddpm", None)):
        made = recipe(saved(name)[1], prompts, None, solver=DDIM)
        assert {*run.COLUMNS, *made.parts.model.columns, "x0"} == {*generate(made, 0, 2)}


def test_one_prompt_for_all_rows_is_a_label(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    found = generate(recipe(folder, prompt_file, solver=DDIM, labels=3), 0, 4)
    assert set(found["prompt"]) == {tiny.PROMPTS[3]}


def test_bfloat16_texts_are_kept_exactly():
    shelf, value = Shelf(), torch.randn(1, 3, 2).bfloat16()
    first = Texts(lambda text: {"embeds": value}, "encoder")
    first.kept = shelf
    first("a")
    again = Texts(lambda text: {}, "encoder")
    again.kept = shelf
    found = again.batch(("a", "a"), "cpu", torch.bfloat16)["embeds"]
    assert torch.equal(found, value.repeat(2, 1, 1)) and again.encoded == 0


def test_texts_are_forgotten_when_they_outgrow_their_bound():
    asked = []
    texts = Texts(lambda text: asked.append(text) or {"embeds": torch.zeros(1, 256)}, "encoder", max_bytes=2048)
    for text in ("a", "b", "a", "c", "a", "b"):  # 1024 bytes each
        texts(text)
    assert asked == ["a", "b", "c", "b"]


# --- memory ----------------------------------------------------------------------------------------------------------


def limited(most):
    """A function of rows that has memory for so many."""

    def function(rows):
        if rows.stop - rows.start > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.arange(rows.start, rows.stop)

    return function


def test_portions_are_halved_when_memory_runs_out_and_stay_so():
    portions = Portions("the network", halvings=3)
    assert portions(limited(5), 19).tolist() == list(range(19))
    assert (portions.size, portions.halved) == (4, 2)
    assert portions(limited(4), 8).tolist() == list(range(8))


def test_a_batch_that_does_not_fit_is_refused_with_the_number_that_does():
    with pytest.raises(ValueError, match="out of memory with 16 rows at once; 4 fit. Set batch_size=4, or model.halv"):
        Portions("the network", halvings=1)(limited(5), 16)
    with pytest.raises(ValueError, match="out of memory with a single row"):
        Portions("the decoder", halvings=9)(limited(0), 4)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def function(rows):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        Portions("the network", halvings=3)(function, 4)


def test_rows_record_how_many_shared_a_call(saved, prompt_file, monkeypatch):
    _, folder = saved("stable_diffusion")
    made = recipe(folder, prompt_file, None, solver=DDIM)
    plain = images(made)
    model = run.load_model(made)
    forward = type(model.network).forward

    def small(self, x, *rest, **more):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, x, *rest, **more)

    monkeypatch.setattr(type(model.network), "forward", small)
    found = generate(made, 0, ROWS)
    model._calls.size = model._calls.halved = 0
    assert found["rows_per_call"].tolist() == [2] * ROWS
    np.testing.assert_allclose(found["x0"], plain, atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


def build(path, **fields):
    return registry.models.build({"name": "diffusers", "path": str(path)} | fields)


def missing_index(folder):
    (folder / "model_index.json").unlink()


def other_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDifusionPipeline"}))


def missing_component(folder):
    shutil.rmtree(folder / "vae")


def pickled(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


DAMAGE = [
    (missing_index, "has no model_index.json, so it is not a diffusers pipeline"),
    (other_class, "unknown pipeline class 'StableDifusionPipeline', did you mean 'StableDiffusionPipeline'"),
    (missing_component, "lacks the component 'vae' of a StableDiffusionPipeline"),
    (pickled, "no .safetensors weights; found diffusion_pytorch_model.bin. Pickled weights are not loaded"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_folder_that_is_no_whole_pipeline_is_refused(saved, tmp_path, damage, message):
    shutil.copytree(saved("stable_diffusion")[1], tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "it")


VOCABULARIES = [
    (
        "stable_diffusion",
        "tokenizer",
        "no whole CLIPTokenizer: it lacks vocab.json and merges.txt .or tokenizer.json.,",
    ),
    (
        "pixart",
        "tokenizer",
        "no whole T5Tokenizer: it lacks spiece.model .or tokenizer.json., without which prompts are",
    ),
    ("sd3", "tokenizer_3", "/tokenizer_3 is no whole T5Tokenizer: .* Save or download tokenizer_3/ again"),
]


@pytest.mark.parametrize(("name", "part", "message"), VOCABULARIES)
def test_a_tokenizer_without_its_vocabulary_is_refused_when_planning(saved, tmp_path, name, part, message):
    """transformers makes one of two words up, and the prompt is ignored."""
    shutil.copytree(saved(name)[1], tmp_path / "it")
    (tmp_path / "it" / part / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "it")


def older_files(folder):
    """The files of the tokenizer of a tiny pipeline in the older format."""
    (folder / "tokenizer.json").unlink()
    words = tiny.clip_tokenizer().get_vocab()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_a_tokenizer_of_the_older_files_is_whole(saved, prompt_file, tmp_path):
    shutil.copytree(saved("stable_diffusion")[1], tmp_path / "it")
    older_files(tmp_path / "it" / "tokenizer")
    made = [recipe(str(folder), prompt_file, solver=DDIM) for folder in (tmp_path / "it", saved("stable_diffusion")[1])]
    np.testing.assert_array_equal(images(made[0]), images(made[1]))
    (tmp_path / "it" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ValueError, match="it lacks merges.txt .or tokenizer.json., without"):
        build(tmp_path / "it")


def test_a_sentencepiece_vocabulary_needs_its_package(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("pixart")[1], tmp_path / "it")
    (tmp_path / "it" / "tokenizer" / "tokenizer.json").rename(tmp_path / "it" / "tokenizer" / "spiece.model")
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="spiece.model cannot be read without a package: pip install sentencepiece"):
        build(tmp_path / "it")
    monkeypatch.setattr(vocabulary, "find_spec", lambda name: name)
    build(tmp_path / "it")


def test_a_vocabulary_of_another_model_is_refused_before_sampling(saved, tmp_path, prompt_file):
    from transformers import CLIPTokenizer

    shutil.copytree(saved("stable_diffusion")[1], tmp_path / "it")
    words = ["a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    other = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    other.save_pretrained(tmp_path / "it" / "tokenizer")
    made = recipe(str(tmp_path / "it"), prompt_file, solver=DDIM)
    with pytest.raises(
        ValueError, match="/tokenizer has 4 tokens, but its network was trained with 54, so texts would"
    ):
        images(made)


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart"])
def test_a_prompt_of_which_no_tokenizer_knows_any_part_is_refused_before_sampling(saved, tmp_path, name):
    (tmp_path / "prompts.txt").write_text("a fox\n\u72d0\u72f8 7\n")
    made = recipe(saved(name)[1], str(tmp_path / "prompts.txt"), solver=DDIM)
    with pytest.raises(ValueError, match="knows no part of the prompt '\u72d0\u72f8 7', so it would be ignored"):
        images(made)


def edited(saved, folder, name, part, edit):
    """A copy of a pipeline in which the tensors of one component are others."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved(name)[1], folder)
    (file,) = (folder / part).glob("*.safetensors")
    state = edit(load_file(file))
    save_file(state, file, metadata={"format": "pt"})
    return str(folder)


def without(state, count=3):
    """Without its first matrices."""
    gone = [key for key in sorted(state) if state[key].dim() > 1][:count]
    return {key: value for key, value in state.items() if key not in gone}


PARTS = [("stable_diffusion", "text_encoder"), ("stable_diffusion", "unet"), ("stable_diffusion", "vae")]
PARTS += [("sd3", "text_encoder_3"), ("dit", "transformer"), ("ddpm", "unet")]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_weights_without_some_tensors_are_refused_when_planning(saved, tmp_path, prompt_file, name, part):
    """transformers draws them at random; diffusers leaves them without numbers."""
    folder = edited(saved, tmp_path / "it", name, part, without)
    prompts = prompt_file if name in ("stable_diffusion", "sd3") else None
    message = f"it/{part} is no whole .*: missing: 3 tensors, .* first. Save or download {part}/ again"
    with pytest.raises(ValueError, match=message):
        recipe(folder, prompts, None)
    with pytest.raises(ValueError, match=message):
        build(folder).load("cpu")
    if part == "vae":
        with pytest.raises(ValueError, match=message):
            build(folder).load_decoder("cpu")


@pytest.mark.parametrize(("name", "part"), PARTS[:2])
def test_weights_of_another_shape_are_refused_when_planning(saved, tmp_path, prompt_file, name, part):
    def wider(state):
        key = min(key for key in state if state[key].dim() > 1)
        return state | {key: torch.cat([state[key], state[key]])}

    folder = edited(saved, tmp_path / "it", name, part, wider)
    with pytest.raises(ValueError, match=f"it/{part} .* shape.* Save or download {part}/ again"):
        recipe(folder, prompt_file, None)


def test_tied_tensors_old_names_and_buffers_that_need_no_saving_are_no_loss(saved, tmp_path, prompt_file):
    def other_end(state):
        return {key.replace("shared", "encoder.embed_tokens"): value for key, value in state.items()}

    def with_places(state):  # and under the names that transformers gave before its fifth version
        state = {f"text_model.{key}": value for key, value in state.items()}
        return state | {"text_model.embeddings.position_ids": torch.arange(16)[None]}

    def old_names(state):
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for key, v in state.items()}
        assert any(".query." in key for key in state)
        return state

    others = [("pixart", "text_encoder", other_end), ("stable_diffusion", "text_encoder", with_places)]
    for name, part, edit in [*others, ("dit", "vae", old_names)]:
        prompts = None if name == "dit" else prompt_file
        made = recipe(edited(saved, tmp_path / name, name, part, edit), prompts, None, solver=DDIM)
        np.testing.assert_array_equal(images(made), images(recipe(saved(name)[1], prompts, None, solver=DDIM)))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_damaged_weights_are_refused_when_planning(saved, tmp_path, prompt_file, part):
    shutil.copytree(saved("stable_diffusion")[1], tmp_path / "it")
    (weights,) = (tmp_path / "it" / part).glob("*.safetensors")
    for size in (1000, weights.stat().st_size - 10):  # within the header, and within the tensors
        weights.write_bytes(weights.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=f"it/{part}/.*safetensors is damaged .*: .* Save or download {part}/ again"
        ):
            recipe(str(tmp_path / "it"), prompt_file)
        shutil.copy(next((Path(saved("stable_diffusion")[1]) / part).glob("*.safetensors")), weights)


def test_a_component_without_its_configuration_is_refused_when_planning(saved, tmp_path, prompt_file):
    shutil.copytree(saved("stable_diffusion")[1], tmp_path / "it")
    (tmp_path / "it" / "text_encoder" / "config.json").unlink()
    with pytest.raises(ValueError, match="it/text_encoder has no config.json, so it is not the text_encoder of"):
        recipe(str(tmp_path / "it"), prompt_file)


def test_a_device_without_room_for_the_weights_is_an_error_that_says_what_to_do(saved, monkeypatch):
    import diffusers

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", full)
    with pytest.raises(ValueError, match="do not fit on cpu as float32: CUDA out of memory.* Set model.dtype=bfloat16"):
        build(saved("ddpm")[1]).load("cpu")


WRONG = [
    ({"width": 15}, "model.width must be a whole multiple of 2 pixels, got 15"),
    ({"dtype": "half"}, "model.dtype must be one of float32, bfloat16, float16, got 'half'"),
    ({"halvings": -1}, "model.halvings must be at least 0"),
    ({"lora": [{"file": "x"}]}, "model.lora.0 must be"),
    (
        {"lora": [{"path": "/nowhere"}]},
        "model.lora.0.path '/nowhere' is not there. Give a .safetensors file, a folder with one, or OWNER",
    ),
    ({"variant": "fp16"}, "no .safetensors weights of variant 'fp16'; found diffusion_pytorch_model.safetensors"),
    ({"prompts": "/nowhere.txt"}, "does not exist"),
    ({"scheduler": {"beta_schedule": "odd"}}, "unknown beta schedule 'odd'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_fields_that_cannot_be_are_refused(saved, fields, message):
    with pytest.raises(ValueError, match=message):
        build(saved("stable_diffusion")[1], **fields)


@pytest.mark.parametrize("name", ["dit", "pixart", "ddpm"])
def test_an_adapter_for_a_pipeline_that_takes_none_is_refused_when_planning(saved, tmp_path, name):
    (tmp_path / "it.safetensors").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="model.lora is given, but diffusers loads no adapters into a .*Pipeline. Leave"
    ):
        build(saved(name)[1], lora=[{"path": str(tmp_path / "it.safetensors")}])


def test_an_adapter_that_is_not_there_is_refused_with_what_may_be_given(saved):
    for path in (
        "lora/missing.safetensors",
        "./missing.safetensors",
        "/nowhere/it.safetensors",
        "owner/it.safetensors",
    ):
        with pytest.raises(ValueError, match="model.lora.0.path '.*' is not there. Give a .safetensors file, a folder"):
            build(saved("stable_diffusion")[1], lora=[{"path": path}])
    with pytest.raises(ValueError, match="model.lora.0.path is empty. Give a .safetensors file"):
        build(saved("stable_diffusion")[1], lora=[{"path": ""}])


def test_a_model_of_labels_or_pixels_takes_no_text_and_no_size(saved):
    with pytest.raises(ValueError, match="model.negative_prompt is given, but .* takes labels"):
        build(saved("dit")[1], negative_prompt="x")
    with pytest.raises(ValueError, match="works on pixels of one size"):
        build(saved("ddpm")[1], height=16)


def test_what_a_cpu_cannot_do_is_refused_when_planning(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    for field, value in (("offload", "model"), ("dtype", "float16")):
        with pytest.raises(ValueError, match=f"model.{field}={value}"):
            recipe(folder, prompt_file, model={field: value})


def test_guidance_without_prompts_is_refused(saved):
    with pytest.raises(ValueError, match="compares prompts with none, but there are none. Set prompts=FILE"):
        recipe(saved("stable_diffusion")[1])


def test_prompts_for_a_model_without_text_are_refused(prompt_file):
    plain = Recipe({"name": "gmm"}, {"name": "ddim"}, {"name": "uniform"}, {"name": "none"}, {"name": "single"})
    with pytest.raises(ValueError, match="needs a model that reads text, got model=gmm"):
        plain.completed().override({"prompts": prompt_file})


def test_a_network_pickle_is_refused():
    with pytest.raises(ValueError, match="is a pickle, which runs code when it is read; none is loaded"):
        build("/models/edm-cifar10-32x32-cond-vp.pkl")


@pytest.mark.parametrize("path", ["owner/name", "owner/name@main", "owner/name@" + "g" * 40])
def test_a_hub_model_must_be_pinned(path):
    with pytest.raises(ValueError, match="is not pinned.*owner/name@COMMIT"):
        build(path)


def hub_error(name):
    """One of the hub's errors, without the HTTP response that it wants."""
    from huggingface_hub import errors

    cls = getattr(errors, name)
    return type(name, (cls,), {"__init__": lambda self: Exception.__init__(self, "refused")})()


HUB = [
    ("GatedRepoError", "is gated: .*hf auth login"),
    ("RepositoryNotFoundError", "no such model, or it is private"),
    ("RevisionNotFoundError", "no such commit"),
    ("LocalEntryNotFoundError", "not in the local cache, and the hub cannot be reached .*hf download owner/name"),
]


@pytest.mark.parametrize(("error", "message"), HUB)
def test_the_hub_s_refusals_say_what_to_do(monkeypatch, error, message):
    import huggingface_hub

    def refuse(*_, local_files_only=False, **__):
        raise hub_error("LocalEntryNotFoundError" if local_files_only else error)

    hub._fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message):
        build("owner/name@" + "0123456789" * 4)


COMMIT = "0123456789" * 4
SD15 = """README.md feature_extractor/preprocessor_config.json model_index.json safety_checker/config.json
safety_checker/model.fp16.safetensors safety_checker/model.safetensors safety_checker/pytorch_model.bin
scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.fp16.safetensors
text_encoder/model.safetensors text_encoder/pytorch_model.bin tokenizer/merges.txt tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json tokenizer/vocab.json unet/config.json unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
unet/diffusion_pytorch_model.safetensors v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
v1-5-pruned.safetensors v1-inference.yaml vae/config.json vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.safetensors""".split()
FLUX = """ae.safetensors flux1-dev.safetensors dev_grid.jpg model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json
text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model-00002-of-00002.safetensors
text_encoder_2/model.safetensors.index.json tokenizer/merges.txt tokenizer/vocab.json tokenizer_2/spiece.model
tokenizer_2/tokenizer.json transformer/config.json transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json
vae/diffusion_pytorch_model.safetensors""".split()
SD3_T5 = """text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
text_encoder_3/model.fp16-00001-of-00002.safetensors text_encoder_3/model.fp16-00002-of-00002.safetensors
text_encoder_3/model-00001-of-00002.fp16.safetensors""".split()


def chosen(files, name, variant=None):
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(files, allow_patterns=hub.wanted({"_class_name": name}, variant, "x"))
    return [file for file in kept if file.endswith(".safetensors")]


def test_of_a_hub_model_only_the_pipeline_in_one_variant_is_fetched():
    kept = chosen(SD15, "StableDiffusionPipeline")
    name = "diffusion_pytorch_model"
    assert kept == ["text_encoder/model.safetensors", f"unet/{name}.safetensors", f"vae/{name}.safetensors"]
    kept = chosen(SD15, "StableDiffusionPipeline", "fp16")
    assert kept == [
        "text_encoder/model.fp16.safetensors", f"unet/{name}.fp16.safetensors", f"vae/{name}.fp16.safetensors",
    ]  # fmt: skip
    kept = chosen(SD15, "StableDiffusionPipeline", "non_ema")
    assert kept == [f"unet/{name}.non_ema.safetensors"]
    kept = chosen(FLUX, "FluxPipeline")
    assert len(kept) == 7 and not {"ae.safetensors", "flux1-dev.safetensors"} & {*kept}
    files = [*SD3_T5, "text_encoder_3/config.json"]
    assert chosen(files, "StableDiffusion3Pipeline") == []  # its index says that it has no third encoder
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": ["transformers", "T5EncoderModel"]}
    for variant, places in ((None, slice(2)), ("fp16", slice(2, 5))):
        patterns = hub.wanted(index, variant, "x")
        assert [f for f in files if any(fnmatchcase(f, p) for p in patterns) and "model" in f] == SD3_T5[places]


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A hub that serves one folder: what is fetched is copied, and what the cache has is served without it."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    source, cache, asked = tmp_path / "source", tmp_path / "cache", []

    def files(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def download(name, revision, allow_patterns, local_files_only=False):
        if local_files_only and not cache.is_dir():
            raise hub_error("LocalEntryNotFoundError")
        for file in () if local_files_only else filter_repo_objects(files(source), allow_patterns=allow_patterns):
            asked.append(file)
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, cache / file)
        return str(cache)

    for found in (hub._fetch, hub._fetch_adapter):
        found.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: files(source))
    yield source, cache, asked
    for found in (hub._fetch, hub._fetch_adapter):
        found.cache_clear()


def test_the_index_of_a_hub_model_is_fetched_first_and_then_its_components_once(served, saved):
    source, cache, asked = served
    shutil.copytree(saved("stable_diffusion")[1], source)
    (source / "v1-5-pruned.safetensors").write_bytes(b"x")
    shutil.copytree(source / "vae", source / "safety_checker")
    assert build(f"owner/name@{COMMIT}").revision == build(source).revision
    assert asked[0] == "model_index.json" and not any("v1-5" in file or "safety" in file for file in asked)
    hub._fetch.cache_clear()
    count = len(asked)
    assert build(f"owner/name@{COMMIT}").shape == (4, 8, 8) and len(asked) == count
    hub._fetch.cache_clear()
    (cache / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # a download that was broken off
    assert build(f"owner/name@{COMMIT}").load_decoder("cpu") and len(asked) > count


def test_a_hub_model_that_cannot_be_sampled_is_refused_before_its_weights_are_fetched(served, saved):
    source, _, asked = served
    shutil.copytree(saved("stable_diffusion")[1], source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="owner/name@.* cannot be sampled: unknown pipeline class 'KandinskyPipeline'"):
        build(f"owner/name@{COMMIT}")
    assert asked == ["model_index.json"]


def test_a_variant_that_a_hub_model_lacks_is_refused_with_what_it_has(served, saved):
    source, _, _ = served
    shutil.copytree(saved("dit")[1], source)
    message = (
        "no .safetensors weights of transformer in variant 'fp16'; it has transformer/config.json, transformer/diff"
    )
    with pytest.raises(ValueError, match=message):
        build(f"owner/name@{COMMIT}", variant="fp16")


def test_a_hub_model_without_an_index_is_no_pipeline(served):
    served[0].mkdir()
    (served[0] / "flux1-dev.safetensors").write_bytes(b"x")
    served[1].mkdir()
    with pytest.raises(ValueError, match="owner/name@.* has no model_index.json, so it is not a diffusers pipeline"):
        build(f"owner/name@{COMMIT}")


def test_of_a_hub_s_adapters_one_is_fetched(served, saved):
    source, _, asked = served
    source.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (source / name).write_bytes(b"x")
    folder, path = saved("stable_diffusion")[1], f"owner/name@{COMMIT}"
    with pytest.raises(ValueError, match="holds a.safetensors, b.safetensors. Set weight beside it"):
        build(folder, lora=[{"path": path}])
    made = build(folder, lora=[{"path": path, "weight": "b.safetensors"}])
    assert made.adapters[0][0].name == "b.safetensors" and asked == ["b.safetensors"]
    hub._fetch_adapter.cache_clear()
    (source / "a.safetensors").unlink()
    assert build(folder, lora=[{"path": path}]).adapters[0][0].name == "b.safetensors"


def test_a_pinned_hub_model_is_read_from_its_snapshot(monkeypatch, saved):
    import huggingface_hub

    hub._fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: saved("dit")[1])
    assert build("owner/name@" + "0123456789" * 4).revision == build(saved("dit")[1]).revision
    hub._fetch.cache_clear()


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_lcm_preset_has_the_stock_scheduler_s_steps():
    from diffusers import LCMScheduler, TCDScheduler
    from omegaconf import OmegaConf

    for name, cls in (("lcm", LCMScheduler), ("tcd", TCDScheduler)):
        scheduler = cls()
        scheduler.set_timesteps(4)
        values = OmegaConf.load(PRESETS / f"{name}.yaml").times["values"]
        assert [round(1000 * t - 1) for t in values[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("family", "model", "why"),
    [
        ("stable_diffusion", {"max_tokens": 4}, "model.max_tokens does nothing for this StableDiffusionPipeline"),
        ("stable_diffusion", {"embedded_guidance": 3.0}, "takes no guidance scale as an input; use guidance=cfg"),
        ("stable_diffusion", {"height": 0}, "model.height must be a whole multiple of 2 pixels, got 0"),
        ("stable_diffusion", {"scheduler": {"beta_strat": 0.1}}, "did you mean 'beta_start'"),
        ("stable_diffusion", {"attention": "efficient_attention"}, "needs device=cuda. Use math or flash_attention"),
        ("ddpm", {"embedded_guidance": 3.0}, "model.embedded_guidance does nothing"),
        ("ddpm", {"decode_rows": 3}, "works on pixels of one size"),
        ("dit", {"channels_last": True}, "its network is no UNet"),
        ("dit", {"height": 24, "width": 16}, "latents of 12 x 8, but this transformer was made for 8 x 8"),
        ("sd3", {"height": 128, "width": 128}, "knows positions for"),
    ],
)
def test_options_that_do_nothing_or_cannot_work_are_refused_when_planning(saved, family, model, why):
    _, folder = saved(family)
    with pytest.raises(ValueError, match=why):
        recipe(folder, guidance=None, model=model)


def test_a_guidance_scale_is_refused_where_flux_takes_none(saved):
    _, folder = saved("flux", guidance_embeds=False)
    with pytest.raises(ValueError, match="model.embedded_guidance does nothing for this FluxPipeline"):
        recipe(folder, guidance=None, model={"embedded_guidance": 3.0})


def test_a_negative_prompt_that_nothing_asks_for_is_refused(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    model, times = {"negative_prompt": "a blur"}, {"name": "uniform", "num_steps": 2}
    with pytest.raises(ValueError, match="model.negative_prompt does nothing with guidance=none, .* set guidance=cfg"):
        recipe(folder, prompt_file, None, model=model)
    made = recipe(folder, prompt_file, model=model, solver={"name": "ddim", "eta": 1.0}, times=times)
    for guidance in ("cfgpp", "rescaled_cfg", "cfg_schedule", [{"name": "cfg"}, {"name": "pag"}]):
        made.override({"guidance": guidance, "solver.eta": 0.0}).check()
    corrected = made.override({"guidance": "none", "strategy": {"name": "fkc", "scale": 2.0}})
    corrected.check()
    with pytest.raises(ValueError, match="model.negative_prompt does nothing"):
        corrected.override({"strategy.scale": None}).check()
    recipe(folder, prompt_file, None, model=model, labels=None)  # it is the condition of every row
    recipe(folder, None, None, model=model)


@pytest.mark.parametrize("name", ["diffusers", "unet"])
@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_unets_that_are_told_more_than_a_label_are_refused(saved, tmp_path, kind, name):
    _, folder = saved("ddpm")
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_embed_type": kind}))
    with pytest.raises(ValueError, match=f"embeds classes by '{kind}'"):
        recipe(str(tmp_path / "copy"), guidance=None, model={"name": name})


# --- options act -----------------------------------------------------------------------------------------------------


def seen_by(module, made, note):
    """What a hook notes of every call of a module while rows are made."""
    found = []
    handle = module.register_forward_pre_hook(lambda m, args: found.append(note(args)))
    try:
        images(made)
    finally:
        handle.remove()
    return found


def test_channels_last_reaches_every_convolution(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    is_last = lambda x: x.is_contiguous(memory_format=torch.channels_last)  # noqa: E731
    for wanted in (False, True):
        made = recipe(folder, prompt_file, None, model={"channels_last": wanted})
        network = run.load_model(made).network
        seen = seen_by(network.conv_in, made, lambda args: is_last(args[0]))
        assert set(seen) == {wanted} and is_last(network.down_blocks[0].resnets[0].conv1.weight) == wanted


def test_the_attention_kernel_is_the_one_that_was_asked_for(saved, prompt_file):
    _, folder = saved("stable_diffusion")
    enabled = lambda *_: (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())  # noqa: E731
    for name, wanted in ((None, (True, True)), ("math", (True, False)), ("flash_attention", (False, True))):
        made = recipe(folder, prompt_file, None, model={"attention": name})
        assert set(seen_by(run.load_model(made).network, made, enabled)) == {wanted}
    assert enabled() == (True, True)


def test_the_compiled_network_is_the_one_that_answers(saved, prompt_file, monkeypatch):
    _, folder = saved("stable_diffusion")
    compiled, called = [], []

    def compile(function, *_, **__):
        compiled.append(function.__self__)
        return lambda *args, **more: (called.append(len(args[0])), function(*args, **more))[1]

    monkeypatch.setattr(torch, "compile", compile)
    for wanted in (False, True):
        run.load.cache_clear()
        made = recipe(folder, prompt_file, None, model={"compile": wanted})
        images(made)
        assert called == [ROWS] * STEPS * wanted
        assert [module is run.load_model(made).network for module in compiled] == [True] * wanted
    run.load.cache_clear()  # the wrapper counts for this test alone


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [(4, 16)]),
        ({"decode": "sliced"}, [(1, 16)] * 4),
        ({"decode_rows": 3}, [(3, 16), (1, 16)]),
        ({"decode": "tiled"}, None),
    ],
)
def test_pictures_are_decoded_in_the_parts_that_were_asked_for(saved, prompt_file, options, calls):
    """Latents of 16 x 16, where a tile has 8."""
    _, folder = saved("stable_diffusion")
    made = recipe(folder, prompt_file, None, model={"height": 32, "width": 32} | options)
    vae = decoder.decoder(made.parts.model, "cpu")._parts.vae
    seen = seen_by(vae.decoder, made, lambda args: (args[0].shape[0], args[0].shape[-1]))
    if calls is None:
        assert len(seen) > 4 and {rows for rows, _ in seen} == {4} and max(side for _, side in seen) <= 8
    else:
        assert seen == calls
