"""Yes-probability of a visual question answering model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tasks import blip_tower
from tasks.pictures import Preparation, check_picture
from tasks.pretrained import Source
from tasks.prompted import Prompted
from tasks.registry import rewards

SOURCE = Source(
    "reward vqa_yes",
    "blip-vqa-base",
    "Salesforce/blip-vqa-base from the Hugging Face hub (config.json, model.safetensors and the tokenizer)",
    "blip",
    tokenizer="BertTokenizer",
)


@rewards.register("vqa_yes")
@dataclass(frozen=True)
class VQAYes(Prompted):
    """The probability with which a model answers "yes" when asked whether the picture shows its prompt.

    Better than an embedding at who does what to whom. Questions are cut after 64 tokens. Pictures are resized to the
    model's square bicubically, both sides.

    Args:
        path: folder with a BLIP question answering model in transformers' format, or a hub id; empty looks below
            $SOLVUS_WEIGHTS.
        pinned: commit of the hub id.
        prompts: row i has prompt i, over again after the last; empty takes the prompts of the model.
        question: what is asked, with {} in place of the prompt.
        answer: the answer whose probability it is.

    Reference: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (VQAScore), with
        BLIP (Li et al. 2022) as the model.
    Cost: one picture and one question through BLIP.
    """

    path: str = ""
    pinned: str = ""
    prompts: tuple[str, ...] = ()
    question: str = "does this picture show {}?"
    answer: str = "yes"

    differentiable = True

    def __post_init__(self) -> None:
        if "{}" not in self.question or not self.answer:
            raise ValueError(
                f"reward.question must hold {{}} where the prompt goes, and reward.answer a word; got "
                f"{self.question!r} and {self.answer!r}."
            )

    @property
    def revision(self) -> str:
        """Hash of the weights."""
        return SOURCE.revision(self.path, self.pinned)

    def check(self, shape: tuple[int, ...]) -> None:
        """Pictures, prompts, and the weights at hand."""
        check_picture(shape, "vqa_yes")
        self.check_prompts()
        SOURCE.find(self.path, self.pinned)

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,) float64, between 0 and 1."""
        place = SOURCE.find(self.path, self.pinned)
        model = blip_tower.load_answers(str(place), self.revision, str(samples.device))
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        return model.probability(Preparation(model.size, fit="squash")(samples), questions, self.answer)
