"""Complete tiny pipelines of the classes that people use: random weights, small tokenizers, saved with save_pretrained.

Every builder takes a folder and returns the pipeline that it saved there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tasks.checkpoint import WEIGHTS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a red fox", "two green apples", "a red fox", "the sea at night"]


def vae(channels: int = 4, shift: bool = False) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.1 if shift else None,
        use_quant_conv=not shift,
        use_post_quant_conv=not shift,
    )


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def clip(projection: bool = False, hidden: int = 16) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=hidden, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        hidden_act="gelu" if projection else "quick_gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=16)


def t5(hidden: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=30, d_model=hidden, d_kv=8, d_ff=16, num_layers=1, num_heads=2, relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config)


def unet(cross: int | None, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": cross,
        }
        | more
    )


def save(pipe: Any, folder: Path) -> Any:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # from_pretrained does so
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(folder: Path, prediction: str = "epsilon", **more: Any) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(16, **more),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder)


def sdxl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(1)
    net = unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=net,
        scheduler=scheduler,
        add_watermarker=False,
    )
    return save(pipe, folder)


def sd3(folder: Path, with_t5: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(2)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift=True),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(32) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    return save(pipe, folder)


def flux(folder: Path, guidance_embeds: bool = True, shifts: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(3)
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()  # schnell's
    if shifts:
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
    pipe = FluxPipeline(
        transformer=net,
        scheduler=scheduler,
        vae=vae(shift=True),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )
    return save(pipe, folder)


def pixart(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(4)
    net = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(
        transformer=net,
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )
    return save(pipe, folder)


def dit(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(5)
    net = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", activation_fn="gelu-approximate",
        norm_elementwise_affine=False,
    )  # fmt: skip
    return save(DiTPipeline(transformer=net, vae=vae(), scheduler=DDIMScheduler(clip_sample=False)), folder)


def ddpm(folder: Path, classes: int | None = None, **scheduler: Any) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(6)
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
    )  # fmt: skip
    return save(DDIMPipeline(unet=net, scheduler=DDIMScheduler(**scheduler)), folder)


def digits(folder: Path) -> Path:
    """The embedded digits model as a pipeline, made without diffusers: only its index is new."""
    shutil.copytree(WEIGHTS / "digits" / "unet", folder / "unet")
    shutil.copytree(WEIGHTS / "digits" / "scheduler", folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DModel"]}))
    return folder


BUILDERS = {
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "dit": dit,
    "ddpm": ddpm,
}
