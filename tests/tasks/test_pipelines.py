"""Pipelines in our sampling loop: the stock pipelines' images, prompts, options and refusals."""

import json
import math

import numpy as np
import pytest
import torch

from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate
from tests.tasks import tiny_pipelines as tiny

# numpy's word to a stock scheduler that hands it a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

STEPS, SCALE, ROWS = 3, 2.5, 4


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(tiny.PROMPTS) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Builds a pipeline once, by its name in ``tiny_pipelines`` and arguments: (stock pipeline, folder)."""
    held = {}

    def get(name, **more):
        key = (name, json.dumps(more, sort_keys=True))
        if key not in held:
            folder = tmp_path_factory.mktemp(name)
            held[key] = (getattr(tiny, name)(folder, **more), str(folder))
        return held[key]

    return get


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
FLOW = {"name": "diffusers", "scheduler": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_equals_the_stock_pipeline(saved, prompt_file, prediction):
    stock, folder = saved("stable_diffusion", prediction=prediction)
    solver = PNDM | {"config": PNDM["config"] | {"prediction_type": prediction}}  # it keeps what the network predicts
    made = recipe(folder, prompt_file, solver=solver)
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


def test_sdxl_equals_the_stock_pipeline(saved, prompt_file):
    stock, folder = saved("sdxl")
    made = recipe(folder, prompt_file, solver=EULER)
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_equals_the_stock_pipeline(saved, prompt_file, with_t5):
    stock, folder = saved("sd3", with_t5=with_t5)
    made = recipe(folder, prompt_file, solver=FLOW | {"config": {"shift": 3.0}})
    found = stock(
        tiny.PROMPTS, latents=noise_of(made), num_inference_steps=STEPS, guidance_scale=SCALE, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_flux_equals_the_stock_pipeline(saved, prompt_file, guidance_embeds):
    from tasks.pipelines.families.flux import pack

    stock, folder = saved("flux", guidance_embeds=guidance_embeds)
    shift = math.exp(0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))  # of 16 tokens
    made = recipe(
        folder, prompt_file, guidance=None, solver=FLOW, model={"height": 16, "width": 16},
        times={"name": "shifted", "num_steps": STEPS, "shift": shift},
    )  # fmt: skip
    found = stock(
        tiny.PROMPTS, latents=pack(noise_of(made)), num_inference_steps=STEPS, height=16, width=16, output_type="pt"
    )
    assert_equal_images(images(made), found.images)


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
    made = recipe(folder, solver={"name": "diffusers", "scheduler": "DDIMScheduler", "config": {"clip_sample": False}})
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


def test_the_digits_model_as_a_pipeline_is_the_digits_model(tmp_path):
    """Labels, guidance and the label after the last, through the other loader."""
    made = recipe(str(tiny.digits(tmp_path / "digits")), solver={"name": "ddim"}, times={"name": "uniform"})
    plain = made.override({"model": "digits"})
    assert made.parts.model.num_classes == 10
    np.testing.assert_array_equal(images(made), images(plain))
