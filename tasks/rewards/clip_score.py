"""CLIPScore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.clip_reward import CLIPReward
from tasks.pretrained import Source
from tasks.registry import rewards

SOURCE = Source(
    "reward clip_score",
    "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14 from the Hugging Face hub (config.json, model.safetensors and the tokenizer)",
    "clip",
    tokenizer="CLIPTokenizer",
)


@rewards.register("clip_score")
@dataclass(frozen=True)
class CLIPScore(CLIPReward):
    """``100 max(0, cos)`` of the CLIP embeddings of a picture and its prompt.

    Values depend on which CLIP it is: report the model with them. Prompts are cut after 77 tokens. Pictures are resized
    bicubically on the shorter side and cropped in the middle.

    Args:
        path: folder with a CLIP model in transformers' format, or a hub id; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        prompts: row i has prompt i, over again after the last; empty takes the prompts of the model.

    Reference: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", with a weight
        of 100 in place of 2.5.
    Cost: one picture through the vision tower; every prompt once.
    """

    source = SOURCE

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,)."""
        return 100.0 * self.cosine(samples, prompts).clamp(min=0)
