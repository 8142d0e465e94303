"""ImageReward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tasks import blip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.prompted import Prompted
from tasks.registry import rewards

SOURCE = Source(
    "reward image_reward",
    "image_reward",
    "ImageReward.pt from THUDM/ImageReward, and config.json and the tokenizer of Salesforce/blip-itm-large-coco, from "
    "the Hugging Face hub",
    "blip",
    tokenizer="BertTokenizer",
)
MEAN, STD = 0.16717, 1.03334  # of the raw scores of its authors' data


@rewards.register("image_reward")
@dataclass(frozen=True)
class ImageReward(Prompted):
    """``(raw - 0.16717) / 1.03334`` of a linear head on a BLIP encoder that reads the prompt while it looks.

    Prompts are cut after 35 tokens. Pictures are resized bicubically on the shorter side and cropped in the middle. The
    published weights are read through transformers' BLIP under a fixed map of names.

    Args:
        path: folder with BLIP's settings and tokenizer and the weights; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of a hub id.
        prompts: row i has prompt i, over again after the last; empty takes the prompts of the model.
        weights: name of the weights' file in that folder.
        size: side of the pictures that the weights were trained on.

    Reference: Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation".
    Cost: one picture and one prompt through BLIP.
    """

    path: str = ""
    pinned: str = ""
    prompts: tuple[str, ...] = ()
    weights: str = "ImageReward.pt"
    size: int = 224

    differentiable = True

    @property
    def _source(self) -> Source:
        return replace(SOURCE, files=(self.weights,))

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return self._source.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, prompts, and the weights at hand."""
        check_picture(shape, "image_reward")
        self.check_prompts()
        self._source.find(self.path, self.pinned)

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,)."""
        place, device = self._source.find(self.path, self.pinned), str(samples.device)
        network, tokenizer = blip_tower.load_image_reward(str(place), self.revision, self.weights, self.size, device)
        raw = network(Preparation(self.size)(samples), blip_tower.tokens(tokenizer, prompts, 35, device))
        return (raw - MEAN) / STD
