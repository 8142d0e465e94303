"""Any saved diffusers pipeline of a known family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from tasks import prompts
from tasks.checkpoint import skeleton
from tasks.image_data import JudgedByPictures
from tasks.layer_skip import Blocks, survey
from tasks.pipelines.decoder import PipelineDecoder, decoder
from tasks.pipelines.denoiser import PipelineDenoiser
from tasks.pipelines.family import Family, Setting, StockSchedule
from tasks.pipelines.folder import PipelineFolder, content
from tasks.pipelines.hub import locate, locate_adapter
from tasks.pipelines.whole import check_whole
from tasks.processes import GaussianProcess
from tasks.prompts import Prompts
from tasks.recipe import digest
from tasks.registry import models

NO_PROMPTS = Prompts((), (), ())


@models.register("diffusers")
@dataclass(frozen=True)
class DiffusersPipeline(JudgedByPictures):
    """A saved diffusers pipeline: Stable Diffusion 1, 2, XL and 3, FLUX, PixArt, DiT, DDPM.

    The sampling loop is ours, so solvers, grids, guidance and strategies work as on any model. Row i has prompt
    ``i mod n`` of the file; the prompt after the last is the empty (or negative) one, which classifier-free guidance
    asks for. Texts are encoded once each. Safety checkers and watermarks are not run. States are kept in the recipe's
    ``dtype``, so a half-precision network sees states that were not rounded between steps, unlike in stock pipelines.

    Args:
        path: a folder made by save_pretrained, or OWNER/NAME@COMMIT on the Hugging Face hub (40 hexadecimal digits).
        prompts: a .txt, .csv, .tsv, .jsonl or .parquet file, or a dataset saved on disk; null leaves the empty prompt.
        negative_prompt: what guidance turns away from; null is the pipeline's own empty condition.
        height: of the image in pixels; null takes the pipeline's.
        width: of the image in pixels; null takes the pipeline's.
        dtype: of the network, the encoders and the decoder: float32, bfloat16 or float16 (needs cuda). The latter two
            keep 8 and 11 significant bits, and so change every row.
        variant: which weight files where there are several, such as fp16.
        scheduler: fields that replace those of the scheduler's configuration (beta_schedule, prediction_type, …).
        lora: adapters, each {path: FILE or OWNER/NAME@COMMIT, weight: file name in it or null, scale: 1.0}.
        distilled: the network is a few-step model: its answer is the end of the flow, for solvers lcm, tcd and
            consistency as well.
        embedded_guidance: guidance scale that a distilled network takes as an input; null is the pipeline's default.
        max_tokens: length of T5's sequences (SD3, FLUX, PixArt); null is the pipeline's default.
        attention: kernel of scaled-dot-product attention: math, flash_attention, efficient_attention or
            cudnn_attention; null lets torch choose. Changes last bits.
        compile: compile the network with torch.compile. Changes last bits.
        channels_last: keep the network's tensors with channels last. Changes last bits.
        decode: whole, sliced (one image after the other; changes last bits) or tiled (overlapping tiles are blended;
            changes images visibly where the decoder looks far).
        decode_rows: most images that are decoded at once; 0 is all.
        offload: none, model or sequential: keep weights in main memory until they are used. Changes nothing in the
            rows, so it is no part of their key.
        halvings: how often a batch may be halved when memory runs out, which changes last bits and is recorded with the
            rows (rows_per_call); 0 refuses and says what fits.
        data: pictures that samples are compared with: a folder, .npz, .npy or .parquet (``tasks/image_data.py``).

    Reference: von Platen et al., diffusers; the files in ``tasks/pipelines/families`` name the papers.
    """

    path: str
    prompts: str | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    variant: str | None = None
    scheduler: dict[str, Any] | None = None
    lora: tuple[dict[str, Any], ...] = ()
    distilled: bool = False
    embedded_guidance: float | None = None
    max_tokens: int | None = None
    attention: str | None = None
    compile: bool = False
    channels_last: bool = False
    decode: str = "whole"
    decode_rows: int = 0
    offload: str = "none"
    halvings: int = 3
    data: str | None = None

    kind = "image"
    # Where things lie, and what changes no row; what lies there enters the key by its content.
    unkeyed = ("path", "prompts", "lora", "offload", "halvings", "data")

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                words = ", ".join("null" if a is None else str(a) for a in allowed)
                raise ValueError(f"model.{name} must be one of {words}, got {value!r}.")
        for name in ("decode_rows", "halvings"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} must be at least 0, got {getattr(self, name)}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"model.max_tokens must be at least 1, got {self.max_tokens}.")
        _ = self.folder
        if self.lora:
            self._check_takes_adapters()
        _ = self.adapters
        self._check_size()
        if not self.folder.family.text:
            for name in ("prompts", "negative_prompt", "max_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"model.{name} is given, but {self.path} takes labels, not text. Leave it out.")
        if not self.folder.family.vae and (self.decode != "whole" or self.decode_rows or self.height or self.width):
            raise ValueError(
                f"{self.path} works on pixels of one size: leave out model.decode, decode_rows, height and width."
            )
        self._check_used()
        _ = self.prompt_table

    def _check_used(self) -> None:
        """Refuse options that would change nothing but the key."""
        family, network = self.folder.family, self.folder.network
        what = self.folder.index["_class_name"]
        idle = (
            ("max_tokens", self.max_tokens is not None and not family.takes_tokens, "its texts have one length"),
            (
                "embedded_guidance",
                self.embedded_guidance is not None and not family.embeds_guidance(network),
                "its network takes no guidance scale as an input; use guidance=cfg",
            ),
            ("channels_last", self.channels_last and family.network != "unet", "its network is no UNet"),
        )
        for name, stands, why in idle:
            if stands:
                raise ValueError(f"model.{name} does nothing for this {what}: {why}. Leave it out.")

    def _check_takes_adapters(self) -> None:
        import diffusers

        name = self.folder.index["_class_name"]
        if not hasattr(getattr(diffusers, name), "load_lora_weights"):
            raise ValueError(
                f"model.lora is given, but diffusers loads no adapters into a {name}. Leave it out, or merge it into "
                "the weights of the network and save these."
            )

    def _check_size(self) -> None:
        unit = self._factor * self.folder.family.multiple
        for name, size in zip(("height", "width"), self._size, strict=True):
            if size < unit or size % unit:
                raise ValueError(f"model.{name} must be a whole multiple of {unit} pixels, got {size}.")
        self.folder.family.check_network(self.folder.network, *(side // self._factor for side in self._size))

    @cached_property
    def folder(self) -> PipelineFolder:
        """The folder, checked."""
        return PipelineFolder(locate(self.path, variant=self.variant), self.variant, self.scheduler)

    @cached_property
    def prompt_table(self) -> Prompts:
        """The prompts; none where conditions are labels, or where no file is given."""
        return NO_PROMPTS if self.prompts is None else prompts.read(self.prompts)

    @cached_property
    def adapters(self) -> tuple[tuple[Path, float], ...]:
        """File and scale of every LoRA adapter."""
        return tuple(_adapter(item, f"model.lora.{i}") for i, item in enumerate(self.lora))

    @property
    def gives(self) -> tuple[str, ...]:
        """What its answer is."""
        return ("posterior_mean", "flow_end") if self.distilled else ("posterior_mean",)

    @property
    def noising(self) -> GaussianProcess:
        """The process object."""
        return self.folder.process

    @property
    def _factor(self) -> int:
        return self.folder.family.factor(self.folder.config("vae")) if self.folder.family.vae else 1

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self.folder.family.default_size(self.folder.network)
        given = (height * self._factor, width * self._factor)
        return (given[0] if self.height is None else self.height, given[1] if self.width is None else self.width)

    @property
    def setting(self) -> Setting:
        """What the family is told beside states and prompts."""
        return Setting(*self._size, self.embedded_guidance, self.max_tokens)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of a state."""
        height, width = self._size
        return (self.folder.family.channels(self.folder.network), height // self._factor, width // self._factor)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(3, H, W) of an image."""
        return (3, *self._size) if self.folder.family.vae else self.shape

    @property
    def num_classes(self) -> int:
        """Number of rows of the prompt file, or of labels; 0 without conditions."""
        return len(self.prompt_table) if self.folder.family.text else self.folder.family.classes(self.folder.network)

    @property
    def columns(self) -> tuple[str, ...]:
        """What its rows say beside those of all models."""
        return ("rows_per_call", *(("prompt", "prompt_id", "group") if self.folder.family.text else ()))

    @property
    def stock_schedule(self) -> StockSchedule:
        """How the stock pipeline sets up its scheduler."""
        folder = self.folder
        return StockSchedule(
            folder.scheduler, lambda config, steps: folder.family.grid_options(config, self.shape, steps)
        )

    @property
    def skeleton(self) -> torch.nn.Module:
        """The network without weights, on the meta device: what guidance may look for in it."""
        return skeleton(json.dumps(self.folder.network, sort_keys=True))

    @property
    def blocks(self) -> Blocks:
        """The blocks of the network that steps may leave out."""
        return _blocks(json.dumps(self.folder.network, sort_keys=True), self.folder.family, self.shape, self.setting)

    @property
    def revision(self) -> str:
        """Hash of weights, configurations, vocabularies, adapters and prompts."""
        folder, parts = self.folder, [[content(file), scale] for file, scale in self.adapters]
        table = self.prompt_table.digest if len(self.prompt_table) else ""
        return digest([folder.index["_class_name"], folder.digest(folder.components), parts, table])[:16]

    def text(self, label: int) -> str | None:
        """The prompt of a label; the empty condition for any other number."""
        return self.prompt_table.texts[label] if 0 <= label < len(self.prompt_table) else self.negative_prompt

    def text_identity(self, device: str) -> Any:
        """What determines an encoded text, beside the text."""
        parts = [[content(file), scale] for file, scale in self.adapters]
        family = self.folder.family
        return [type(family).__name__, self.folder.digest(family.text_parts(self.folder.components)), parts,
                self.dtype, self.max_tokens, device]  # fmt: skip

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what the device cannot do, guidance without prompts, and weights that are not whole.

        Raises:
            ValueError: says what, and what to do.
        """
        if self.folder.family.text and not self.num_classes and recipe.parts.guidance.needs_labels:
            raise ValueError(
                f"guidance {recipe.guidance['name']} compares prompts with none, but there are none. Set prompts=FILE, "
                "or guidance=none."
            )
        asking = (recipe.parts.guidance, recipe.parts.strategy)
        asked = any(getattr(plugin, "asks_unlabelled", False) for plugin in asking)
        if self.negative_prompt is not None and recipe.has_labels and not asked:
            raise ValueError(
                f"model.negative_prompt does nothing with guidance={recipe.guidance['name']}, which asks for no empty "
                "prompt. Leave it out, or set guidance=cfg."
            )
        if recipe.device == "cpu" and self.offload != "none":
            raise ValueError(f"model.offload={self.offload} moves weights off a cuda device. Set model.offload=none.")
        if recipe.device == "cpu" and self.dtype == "float16":
            raise ValueError("model.dtype=float16 needs device=cuda. Use float32 or bfloat16.")
        if recipe.device == "cpu" and self.attention in ("efficient_attention", "cudnn_attention"):
            raise ValueError(f"model.attention={self.attention} needs device=cuda. Use math or flash_attention.")
        check_whole(self.folder)
        self._check_surgery(recipe)

    def _check_surgery(self, recipe: Any) -> None:
        """Refuse options that cannot stand beside what changes the network between two evaluations."""
        whole = recipe.parts.guidance
        touching = [p.name for p in getattr(whole, "plugins", (whole,)) if getattr(p, "touches_layers", False)]
        who = f"guidance {touching[0]} changes" if touching else "the schedule's skip changes"
        if self.compile and (touching or recipe.masks):
            raise ValueError(
                f"{who} layers between two evaluations, which a compiled network does not see. Set model.compile=false."
            )
        if not getattr(whole, "remembers", False):
            return
        if self.offload != "none":
            raise ValueError(f"{who} layers of a copy of the network: it needs model.offload=none.")
        if self.halvings and recipe.device != "cpu":
            raise ValueError(
                f"guidance {touching[0]} remembers whole batches, which must not be halved when memory runs out. Set "
                "model.halvings=0 and a batch_size that fits."
            )

    @property
    def decodes_apart(self) -> bool:
        """Whether states become images in a stage of their own, after the rows of a shard are sampled."""
        return self.folder.family.vae

    def load_decoder(self, device: str) -> PipelineDecoder:
        """The decoder alone on a device."""
        return decoder(self, device)

    def load(self, device: str) -> PipelineDenoiser:
        """The denoiser on a device."""
        return PipelineDenoiser(self, device)


@lru_cache(maxsize=64)
def _blocks(config: str, family: Family, shape: tuple[int, ...], setting: Setting) -> Blocks:
    with torch.device("meta"):
        network, x, time = skeleton(config), torch.zeros(1, *shape), torch.zeros(1)
        blank = family.blank(json.loads(config), setting)
        return survey(network, lambda: family.predict(None, network, x, time, blank, setting))


_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "attention": (None, "math", "flash_attention", "efficient_attention", "cudnn_attention"),
    "decode": ("whole", "sliced", "tiled"),
    "offload": ("none", "model", "sequential"),
}


def _adapter(item: dict[str, Any], what: str) -> tuple[Path, float]:
    """File and scale of one adapter.

    Raises:
        ValueError: fields that are not known, no such file, or a folder with several.
    """
    wrong = sorted(set(item) - {"path", "weight", "scale"})
    scale = item.get("scale", 1.0)
    if wrong or not isinstance(item.get("path"), str) or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"{what} must be {{path: …, weight: file name or null, scale: number}}, got {item!r}.")
    place = Path(item["path"]).expanduser()
    place = place if place.is_file() else locate_adapter(item["path"], f"{what}.path", item.get("weight"))
    files = [place] if place.is_file() else sorted(place.glob(item.get("weight") or "*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors" or not files[0].is_file():
        found = ", ".join(file.name for file in files) or "nothing"
        raise ValueError(f"{what} must name one .safetensors file, found {found} in {place}. Set {what}.weight.")
    return files[0], float(scale)
