"""PickScore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks import clip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.prompted import Prompted
from tasks.registry import rewards

SOURCE = Source(
    "reward pick_score",
    "PickScore_v1",
    "yuvalkirstain/PickScore_v1 (config.json, model.safetensors) and the tokenizer of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K from the Hugging Face hub",
)


@rewards.register("pick_score")
@dataclass(frozen=True)
class PickScore(Prompted):
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

    path: str = ""
    pinned: str = ""
    prompts: tuple[str, ...] = ()

    differentiable = True

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return SOURCE.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, prompts, and the weights at hand."""
        check_picture(shape, "pick_score")
        self.check_prompts()
        SOURCE.find(self.path, self.pinned)

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,)."""
        place = SOURCE.find(self.path, self.pinned)
        tower = clip_tower.load(str(place), self.revision, str(samples.device))
        pixels = Preparation(tower.size)(samples)
        return tower.network.logit_scale.exp() * tower.cosine(pixels, prompts)
