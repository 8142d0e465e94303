"""Human Preference Score v2."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tasks import clip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.prompted import Prompted
from tasks.registry import rewards

SOURCE = Source(
    "reward hps_v2",
    "hps_v2",
    "HPS_v2.1_compressed.pt from xswu/HPSv2, and config.json and the tokenizer of "
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, from the Hugging Face hub",
    "clip",
    tokenizer="CLIPTokenizer",
)


@rewards.register("hps_v2")
@dataclass(frozen=True)
class HPSv2(Prompted):
    """Cosine of the embeddings of a picture and its prompt, by a CLIP-H tuned on human preferences.

    The published weights are open_clip's; they are read through transformers' CLIP under a fixed map of names. Prompts
    are cut after 77 tokens. Pictures are resized bicubically on the longer side, with black around.

    Args:
        path: folder with CLIP-H's settings and tokenizer, and the weights, or a hub id; empty looks below
            $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        prompts: row i has prompt i, over again after the last; empty takes the prompts of the model.
        weights: name of the weights' file in that folder; of open_clip's format, or model.safetensors in transformers'.

    Reference: Wu et al. 2023, "Human Preference Score v2", whose score is the cosine without its temperature.
    Cost: one picture through the vision tower; every prompt once.
    """

    path: str = ""
    pinned: str = ""
    prompts: tuple[str, ...] = ()
    weights: str = "HPS_v2.1_compressed.pt"

    differentiable = True

    @property
    def _source(self) -> Source:
        return replace(SOURCE, files=(self.weights,))

    @property
    def _open_clip(self) -> str:
        return "" if self.weights == "model.safetensors" else self.weights

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return self._source.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, prompts, and the weights at hand."""
        check_picture(shape, "hps_v2")
        self.check_prompts()
        self._source.find(self.path, self.pinned)

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,)."""
        place = self._source.find(self.path, self.pinned)
        tower = clip_tower.load(str(place), self.revision, str(samples.device), self._open_clip)
        pixels = Preparation(tower.size, fit="pad")(samples)
        return tower.cosine(pixels, prompts)
