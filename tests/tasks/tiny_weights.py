"""Complete tiny models of the classes that users have weights of, random, saved the way they are published."""

from __future__ import annotations

import atexit
import re
import shutil
import string
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

PROMPTS = ["a red cat", "two dogs on a very long road", "a house"]


@lru_cache(maxsize=1)
def root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _clip_tokenizer(folder: Path) -> int:
    from transformers import CLIPTokenizer

    pieces = [c + end for c in string.ascii_lowercase for end in ("", "</w>")]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24).save_pretrained(folder)
    return len(vocab)


def clip_config(words: int):
    from transformers import CLIPConfig

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": words, "max_position_embeddings": 24, "bos_token_id": words - 2, "eos_token_id": words - 1}
    vision = {"image_size": 16, "patch_size": 8}
    act = {"hidden_act": "gelu", "projection_dim": 8}
    return CLIPConfig(text_config=shared | text | act, vision_config=shared | vision | act, projection_dim=8)


@lru_cache(maxsize=4)
def clip(seed: int = 0) -> Path:
    """A CLIP model in transformers' format."""
    from transformers import CLIPModel

    folder = root() / f"clip-{seed}"
    words = _clip_tokenizer(folder)
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(words))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 or name.endswith("class_embedding"):
                value.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@lru_cache(maxsize=1)
def aesthetic() -> Path:
    """A CLIP model with a head beside it."""
    folder = root() / "aesthetic"
    shutil.copytree(clip(), folder)
    torch.manual_seed(1)
    sizes = {"0": (8, 12), "2": (12, 6), "4": (6, 5), "6": (5, 4), "7": (4, 1)}
    state = {}
    for number, (inputs, outputs) in sizes.items():
        layer = torch.nn.Linear(inputs, outputs)
        state |= {f"layers.{number}.{name}": value.detach() for name, value in layer.named_parameters()}
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


class OpenClipBlock(torch.nn.Module):
    """A residual attention block as open_clip writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": torch.nn.Linear(width, 2 * width), "gelu": torch.nn.GELU()}
        self.mlp = torch.nn.Sequential()
        for name, layer in (layers | {"c_proj": torch.nn.Linear(2 * width, width)}).items():
            self.mlp.add_module(name, layer)

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(torch.nn.Module):
    """A picture tower as open_clip writes it."""

    def __init__(self, width: int, heads: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(torch.randn(tokens, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(OpenClipBlock(width, heads) for _ in range(2))
        self.proj = torch.nn.Parameter(torch.randn(width, dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)[:, 0] @ self.proj


class OpenClip(torch.nn.Module):
    """Both towers."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual = OpenClipTower(16, 2, 5, 8)
        self.token_embedding = torch.nn.Embedding(words, 16)
        self.positional_embedding = torch.nn.Parameter(torch.randn(24, 16))
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(OpenClipBlock(16, 2) for _ in range(2))
        self.ln_final = torch.nn.LayerNorm(16)
        self.text_projection = torch.nn.Parameter(torch.randn(16, 8))
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))

    def text(self, tokens):
        mask = torch.full((24, 24), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x, mask)
        end = (tokens == self.token_embedding.num_embeddings - 1).int().argmax(dim=1)
        return self.ln_final(x)[torch.arange(len(x)), end] @ self.text_projection


@lru_cache(maxsize=1)
def open_clip() -> tuple[Path, OpenClip]:
    """A folder as hps_v2 needs it, and the model whose weights lie in it."""
    folder = root() / "hps"
    words = _clip_tokenizer(folder)
    clip_config(words).save_pretrained(folder)
    torch.manual_seed(2)
    model = OpenClip(words).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder, model


def blip_config():
    from transformers import BlipConfig

    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 40, "max_position_embeddings": 72, "bos_token_id": 4, "pad_token_id": 0, "sep_token_id": 3}
    return BlipConfig(
        text_config=shared | text | {"projection_dim": 8},
        vision_config=shared | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )


def _bert_tokenizer(folder: Path) -> None:
    from transformers import BertTokenizer

    words = "[PAD] [UNK] [CLS] [SEP] [DEC] [MASK] yes no a red cat dogs house does this picture show ? two on very long"
    BertTokenizer(vocab={word: i for i, word in enumerate(words.split())}).save_pretrained(folder)


@lru_cache(maxsize=1)
def vqa() -> Path:
    """A BLIP question answering model in transformers' format."""
    from transformers import BlipForQuestionAnswering

    folder = root() / "vqa"
    _bert_tokenizer(folder)
    torch.manual_seed(3)
    model = BlipForQuestionAnswering(blip_config())
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def published_name(name: str) -> str:
    """The name in ImageReward.pt of a tensor that our network has."""
    if name.startswith("text_encoder."):
        return f"blip.{name}"
    if name.startswith("head."):
        return name.replace("head.", "mlp.layers.")
    name = name.replace("vision_model.", "blip.visual_encoder.")
    for ours, theirs in (
        ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm"), ("encoder.layers", "blocks"),
        ("layer_norm", "norm"), ("self_attn.projection", "attn.proj"), ("self_attn", "attn"),
    ):  # fmt: skip
        name = re.sub(rf"\b{re.escape(ours)}", theirs, name)
    return name


@lru_cache(maxsize=1)
def image_reward():
    """A folder as image_reward needs it, and the network whose weights lie in it."""
    from tasks.blip_tower import ImageText
    from tasks.linear_head import LinearHead

    folder = root() / "image_reward"
    _bert_tokenizer(folder)
    blip_config().save_pretrained(folder)
    torch.manual_seed(4)
    head = LinearHead({"0": (12, 16), "2": (6, 12), "4": (5, 6), "6": (4, 5), "7": (1, 4)})
    network = ImageText(blip_config(), head).eval()
    with torch.no_grad():
        for value in network.parameters():
            if value.dim() > 1:
                value.normal_(0, 0.3)
    state = {published_name(name): value for name, value in network.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(72)[None]
    torch.save(state, folder / "ImageReward.pt")
    return folder, network


@lru_cache(maxsize=1)
def dinov2() -> Path:
    """A DINOv2 model in transformers' format."""
    from transformers import Dinov2Config, Dinov2Model

    folder = root() / "dinov2"
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


@lru_cache(maxsize=1)
def inception() -> Path:
    """Inception weights."""
    from tasks.inception import Inception

    path = root() / "inception.pth"
    torch.manual_seed(6)
    network = Inception()
    for name, value in network.named_parameters():
        if name.endswith("conv.weight"):  # so that signals neither die nor grow on their way
            torch.nn.init.normal_(value, 0, (2 / value[0].numel()) ** 0.5)
    torch.save(network.state_dict(), path)
    return path


def fields(kind: str, name: str) -> dict:
    """What a plug-in needs to be built on tiny weights; empty for those that need none."""
    prompted = {"prompts": PROMPTS}
    if kind == "features":
        made = {
            "clip": lambda: {"path": str(clip())},
            "dinov2": lambda: {"path": str(dinov2()), "size": 28},
            "inception_v3": lambda: {"path": str(inception()), "sha256": ""},
            "inception_v3_logits": lambda: {"path": str(inception()), "sha256": ""},
        }
    elif kind == "reward":
        made = {
            "clip_score": lambda: {"path": str(clip())} | prompted,
            "pick_score": lambda: {"path": str(clip())} | prompted,
            "hps_v2": lambda: {"path": str(open_clip()[0])} | prompted,
            "image_reward": lambda: {"path": str(image_reward()[0]), "size": 16} | prompted,
            "aesthetic": lambda: {"path": str(aesthetic())},
            "vqa_yes": lambda: {"path": str(vqa())} | prompted,
        }
    else:
        made = {}
    return made[name]() if name in made else {}
