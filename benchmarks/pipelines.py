"""What a study of a diffusers pipeline costs on top of the stock pipeline in a loop.

throughput_ratio           images/s of a study in this process, store and all, against the stock pipeline in a loop that
                           writes PNG files: same model, prompts, batch, scheduler, guidance, steps and dtype
throughput_ratio_unguided  the same without guidance: one network call a step on both sides
cpu_ratio, cpu_ratio_unguided
                           the same in processor seconds, which a busy machine disturbs less

The pipeline is Stable Diffusion's with random weights, small enough for a CPU: a UNet of 32 and 64 channels on latents
of 32 x 32, where arithmetic and not the number of operations takes the time, as in real models. The two sides take
turns. With guidance a study calls the network twice with B rows where the stock pipeline calls it once with 2 B.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, options, publish

Spent = tuple[float, float]
PROMPTS = ["a red fox", "two green apples", "the sea at night", "a wooden chair"]
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULER |= {"steps_offset": 1, "set_alpha_to_one": False}


def build(folder: Path, size: int) -> Any:
    """The stock pipeline, saved and loaded again."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=2 * size,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=size, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=16),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def now() -> Spent:
    """The clock on the wall and that of this process."""
    return time.perf_counter(), time.process_time()


def per_image(began: Spent, count: int) -> Spent:
    """Seconds an image since then, on both clocks."""
    wall, processor = now()
    return (wall - began[0]) / count, (processor - began[1]) / count


def stock_loop(stock: Any, count: int, batch: int, steps: int, scale: float, folder: Path) -> Spent:
    """Seconds an image of the stock pipeline, each written as a PNG file."""
    began = now()
    for first in range(0, count, batch):
        texts = [PROMPTS[i % len(PROMPTS)] for i in range(first, first + batch)]
        for i, image in enumerate(stock(texts, num_inference_steps=steps, guidance_scale=scale).images):
            image.save(folder / f"{first + i}.png", compress_level=1)
    return per_image(began, count)


def study(path: Path, prompts: Path, count: int, batch: int, steps: int, scale: float, root: Path) -> Spent:
    """Seconds an image of the same as a study; the model is warm, as the stock pipeline is."""
    from orchestrator import config
    from orchestrator.ledger import Ledger
    from orchestrator.loop import run
    from orchestrator.progress import Progress
    from orchestrator.registries import executors, trackers
    from orchestrator.store import Store

    guidance = ["guidance=cfg", f"guidance.scale={scale}"] if scale > 1 else ["guidance=none"]
    data = config.compose(
        ["model=diffusers", f"model.path={path}", f"prompts={prompts}", "solver=diffusers", "times=stock",
         "solver.scheduler=DDIMScheduler", "solver.config={clip_sample:false,steps_offset:1,set_alpha_to_one:false}",
         f"times.num_steps={steps}", *guidance,
         f"num_samples={count}", f"batch_size={batch}", f"shard_size={count}", "tracker=none", f"root={root}"]
    )  # fmt: skip
    made = config.study(data)
    began = now()
    watch = Progress(stream=io.StringIO())
    trials: list[Any] = []
    run(made, executors.build("local"), Store(made.root), trackers.build("none"), watch, Ledger(), trials)
    spent = per_image(began, count)
    assert trials[0].state == "complete", trials[0].reason
    return spent


def main() -> None:
    """Measure both in one run."""
    import torch

    args = options(__doc__ or "")
    torch.set_num_threads(1)
    count, batch, steps, size, repeats = (8, 4, 2, 16, 1) if args.quick else (16, 8, 6, 32, 3)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        root, path = Path(folder), Path(folder) / "pipeline"
        stock = build(path, size)
        prompts = root / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        for mark, scale in (("", 5.0), ("_unguided", 1.0)):
            stock_loop(stock, batch, batch, steps, scale, root)
            study(path, prompts, batch, batch, steps, scale, root / f"warm{mark}")
            ratios = []
            for i in range(repeats):
                bare = stock_loop(stock, count, batch, steps, scale, root)
                ours = study(path, prompts, count, batch, steps, scale, root / f"study{mark}{i}")
                ratios.append((bare[0] / ours[0], bare[1] / ours[1]))
                print(f"stock{mark} {1 / bare[0]:,.2f} images/s, study at {ratios[-1][0]:.3f} of it", flush=True)
            wall, processor = (statistics.median(values) for values in zip(*ratios, strict=True))
            figures.append(Figure(f"throughput_ratio{mark}", wall, "ratio", "higher", "wanted >= 0.97"))
            figures.append(Figure(f"cpu_ratio{mark}", processor, "ratio", "higher"))
    publish(figures, args.json)


if __name__ == "__main__":
    main()
