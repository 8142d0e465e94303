"""PickScore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks.clip_reward import CLIPReward
from tasks.pretrained import Source
from tasks.registry import rewards

SOURCE = Source(
    "reward pick_score",
    "PickScore_v1",
    "yuvalkirstain/PickScore_v1 (config.json, model.safetensors) and the tokenizer of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K from the Hugging Face hub",
    "clip",
    tokenizer="CLIPTokenizer",
)


@rewards.register("pick_score")
@dataclass(frozen=True)
class PickScore(CLIPReward):
    """``exp(logit_scale) cos`` of the embeddings of a picture and its prompt, by a CLIP-H tuned on what people picked.

    Differences of two values are log-odds of being picked, so only those within one prompt mean something. Prompts are
    cut after 77 tokens. Pictures are resized bicubically on the shorter side and cropped in the middle.

    Args:
        path: folder with PickScore's model in transformers' format, or a hub id; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        prompts: row i has prompt i, over again after the last; empty takes the prompts of the model.

    Reference: Kirstain et al. 2023, "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        eq. 1.
    Cost: one picture through the vision tower; every prompt once.
    """

    source = SOURCE

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,)."""
        return self.tower(str(samples.device)).network.logit_scale.exp() * self.cosine(samples, prompts)
