"""BLIP through transformers: ImageReward's encoder in its published format, and the question answering model."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.linear_head import LinearHead
from tasks.pretrained import fill, from_folder, read_state
from tasks.vocabulary import check_size


class ImageText(nn.Module):
    """BLIP's picture encoder, its text encoder that looks at the picture, and a linear head on the first token."""

    def __init__(self, config: Any, head: LinearHead) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = head

    def forward(self, pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """(B, 3, size, size) and (B, L) -> (B,)."""
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        looked = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        found = self.text_encoder(**tokens, encoder_hidden_states=seen, encoder_attention_mask=looked)
        return self.head(found.last_hidden_state[:, 0])[:, 0]


@lru_cache(maxsize=2)
def load_image_reward(place: str, revision: str, weights: str, size: int, device: str) -> tuple[ImageText, Any]:
    """The network and its tokenizer, from a folder with BLIP's settings and ImageReward's weights."""
    from transformers import BlipConfig

    folder = Path(place)
    config = BlipConfig.from_pretrained(folder, local_files_only=True)
    config.vision_config.image_size = size  # type: ignore[union-attr]
    state = read_state(folder / weights)
    network = ImageText(config, LinearHead.of(state, "mlp.layers."))
    fill(network, from_image_reward(state), folder / weights)
    return network.eval().requires_grad_(False).to(device), _tokenizer(folder, config)


def _tokenizer(folder: Path, config: Any) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    check_size(found, config.text_config.vocab_size, str(folder))
    return found


_NAMES = (
    (r"^blip\.text_encoder\.", "text_encoder."),
    (r"^blip\.visual_encoder\.", "vision_model."),
    (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^vision_model\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^vision_model\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^vision_model\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^mlp\.layers\.", "head."),
)


def from_image_reward(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's state under the names of :class:`ImageText`."""
    found = {}
    for name, value in state.items():
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


class Answers:
    """A BLIP question answering model: the probability of an answer to a question about a picture.

    Rows with equal questions are asked together and without padding, which transformers' decoder would look at whatever
    mask it is given; so an answer depends on no other row.
    """

    LENGTH = 64

    def __init__(self, network: Any, tokenizer: Any, device: str) -> None:
        self.network, self._tokenizer, self._device = network, tokenizer, device
        self.size = network.config.vision_config.image_size

    def probability(self, pixels: Tensor, questions: list[str], answer: str) -> Tensor:
        """``prod_j p(a_j | a_<j, question, picture)`` over the answer's tokens, (B,) float64."""
        parts, places = [], []
        for question in dict.fromkeys(questions):
            rows = [i for i, other in enumerate(questions) if other == question]
            parts.append(self._asked(pixels[rows], question, answer))
            places += rows
        return torch.cat(parts)[torch.tensor(places, device=pixels.device).argsort()]

    def _asked(self, pixels: Tensor, question: str, answer: str) -> Tensor:
        network, count = self.network, len(pixels)
        words = self._tokenizer(question, truncation=True, max_length=self.LENGTH, return_tensors="pt")["input_ids"]
        said = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        begun = torch.tensor([[network.decoder_start_token_id, *said[:-1]]], device=self._device)
        seen = network.vision_model(pixel_values=pixels).last_hidden_state
        asked = network.text_encoder(
            input_ids=words.to(self._device).expand(count, -1), encoder_hidden_states=seen
        ).last_hidden_state
        logits = network.text_decoder(input_ids=begun.expand(count, -1), encoder_hidden_states=asked).logits
        log_p = torch.log_softmax(logits.double(), dim=-1)
        return log_p[:, torch.arange(len(said)), said].sum(dim=1).exp()


@lru_cache(maxsize=2)
def load_answers(place: str, revision: str, device: str) -> Answers:
    """The question answering model of a folder in transformers' format."""
    from transformers import BlipForQuestionAnswering

    network = from_folder(BlipForQuestionAnswering, Path(place), device)
    return Answers(network, _tokenizer(Path(place), network.config), device)


def tokens(tokenizer: Any, texts: list[str], length: int, device: str) -> dict[str, Tensor]:
    """Token numbers and mask of texts, cut or padded to one length, (B, length) each."""
    given = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: given[name].to(device) for name in ("input_ids", "attention_mask")}
