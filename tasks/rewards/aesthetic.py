"""LAION's aesthetic score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from tasks import clip_tower
from tasks.linear_head import LinearHead
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source, fill, read_state
from tasks.registry import rewards

SOURCE = Source(
    "reward aesthetic",
    "aesthetic",
    "sac+logos+ava1-l14-linearMSE.pth from github.com/christophschuhmann/improved-aesthetic-predictor, and "
    "openai/clip-vit-large-patch14 from the Hugging Face hub (config.json, model.safetensors and the tokenizer)",
    "clip",
)


@rewards.register("aesthetic")
@dataclass(frozen=True)
class Aesthetic:
    """How beautiful people find a picture, about 1 to 10, by a linear chain on its normalised CLIP-L/14 embedding.

    It knows no prompt, and prefers a painterly style: do not select by it alone. Pictures are resized bicubically on
    the shorter side and cropped in the middle.

    Args:
        path: folder with a CLIP-L/14 in transformers' format and the head; empty looks below $SOLVUS_WEIGHTS.
        pinned: commit of a hub id.
        head: name of the head's file in that folder.

    Reference: Schuhmann 2022, improved-aesthetic-predictor (LAION-Aesthetics V2).
    Cost: one picture through the vision tower.
    """

    path: str = ""
    pinned: str = ""
    head: str = "sac+logos+ava1-l14-linearMSE.pth"

    needs_labels = False
    differentiable = True

    @property
    def _source(self) -> Source:
        return replace(SOURCE, files=("model.safetensors", self.head))

    @property
    def revision(self) -> str:
        """Hash of both weights."""
        return self._source.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, and the weights at hand."""
        check_picture(shape, "aesthetic")
        self._source.find(self.path, self.pinned)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,)."""
        place, device = self._source.find(self.path, self.pinned), str(samples.device)
        tower = clip_tower.load(str(place), self.revision, device)
        embedding = clip_tower.normalised(tower.pictures(Preparation(tower.size)(samples)))
        return _head(str(place / self.head), self.revision, device)(embedding)[:, 0]


@lru_cache(maxsize=2)
def _head(path: str, revision: str, device: str) -> LinearHead:
    state = read_state(Path(path))
    head = LinearHead.of(state, "layers.")
    fill(head, {name.removeprefix("layers."): value for name, value in state.items()}, Path(path))
    return head.eval().requires_grad_(False).to(device)
