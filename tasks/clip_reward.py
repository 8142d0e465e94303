"""What the rewards share that compare a picture's CLIP embedding with its prompt's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tasks import clip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.prompted import Prompted


@dataclass(frozen=True)
class CLIPReward(Prompted):
    """A reward of a CLIP model in transformers' format; ``source`` says which."""

    path: str = ""
    pinned: str = ""
    prompts: tuple[str, ...] = ()

    source: ClassVar[Source]
    differentiable: ClassVar[bool] = True

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return self.source.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, prompts, and the weights at hand."""
        check_picture(shape, self.name)
        self.check_prompts()
        self.source.find(self.path, self.pinned)

    def tower(self, device: str) -> clip_tower.Tower:
        """The model, kept warm."""
        return clip_tower.load(str(self.source.find(self.path, self.pinned)), self.revision, device)

    def cosine(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of every picture's embedding and its prompt's, (B,)."""
        tower = self.tower(str(samples.device))
        return tower.cosine(Preparation(tower.size)(samples), prompts)
