"""CLIP's two towers through transformers, from its own format or from open_clip's."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.pretrained import fill, from_folder, read_state
from tasks.vocabulary import check_known, check_size


class Tower:
    """A CLIP model and its tokenizer: unit embeddings of pictures and of texts.

    Every text is encoded alone, padded to the tower's full length and kept, so its embedding depends on no other text.
    Texts are cut after the tower's last position (77 tokens). The tokenizer is read when the first text comes.
    """

    def __init__(self, network: Any, folder: Path, device: str) -> None:
        self.network, self._folder, self._device = network, folder, device
        self.size = network.config.vision_config.image_size
        self._length = network.config.text_config.max_position_embeddings
        self._known: dict[str, Tensor] = {}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        found = CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
        check_size(found, self.network.config.text_config.vocab_size, str(self._folder))
        return found

    def pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, size, size), prepared -> (B, D), not normalised."""
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)

    def texts(self, texts: list[str]) -> Tensor:
        """(B, D), of length 1."""
        unread = {*texts} - self._known.keys()
        if unread:
            check_known([self._tokenizer], unread, str(self._folder))
        with torch.no_grad():
            for text in unread:
                given = self._tokenizer(
                    text, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
                ).to(self._device)
                inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
                found = self.network.text_projection(self.network.text_model(**inputs).pooler_output)
                self._known[text] = normalised(found)[0]
        return torch.stack([self._known[text] for text in texts])

    def cosine(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """Cosine of every picture's embedding and its text's, (B,)."""
        return (normalised(self.pictures(pixels)) * self.texts(texts)).sum(dim=1)


def normalised(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


@lru_cache(maxsize=3)
def load(place: str, revision: str, device: str, weights: str = "") -> Tower:
    """The towers of a folder in transformers' format, or with weights of open_clip's format beside its settings.

    Args:
        place: the folder.
        revision: hash of what is in it; only tells loads apart.
        device: where to.
        weights: name of a file of open_clip's format; empty reads model.safetensors.
    """
    from transformers import CLIPConfig, CLIPModel

    folder = Path(place)
    if not weights:
        return Tower(from_folder(CLIPModel, folder, device), folder, device)
    network = CLIPModel(CLIPConfig.from_pretrained(folder, local_files_only=True))
    fill(network, from_open_clip(read_state(folder / weights, "state_dict")), folder / weights)
    return Tower(network.eval().requires_grad_(False).to(device), folder, device)


_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers' spelling
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state under transformers' names.

    open_clip keeps query, key and value in one matrix, and multiplies by its projections from the right.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T
            continue
        if name == "attn_mask":
            continue
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        if ".attn.in_proj_" in name:
            head, kind = name.split(".attn.in_proj_")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"{head}.self_attn.{part}_proj.{kind}"] = piece
        else:
            found[name] = value
    return found
