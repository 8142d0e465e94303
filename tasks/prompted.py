"""Rewards that read the prompt of a row: the model's, which labels name, or texts of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


def texts_of(model: Any) -> tuple[str, ...]:
    """A model's prompts by label; none where it has none."""
    return tuple(model.prompt_table.texts) if hasattr(model, "prompt_table") else ()


def reading(scorer: Any, texts: Sequence[str]) -> Any:
    """A scorer that knows the model's prompts, where it reads any: label i has ``texts[i]``."""
    return scorer.reading(tuple(texts)) if hasattr(scorer, "reading") else scorer


@dataclass(frozen=True)
class OfPrompts:
    """The scorer of some rows.

    Args:
        score: (samples, prompts) -> (B,).
        prompts: the prompt of every row.
    """

    score: Callable[[Tensor, list[str]], Tensor]
    prompts: list[str]

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,)."""
        return self.score(samples, self.prompts)


class Prompted:
    """What every reward that reads prompts answers.

    Without ``prompts`` of its own, a row's prompt is the model's, and its label is the prompt's number. With them, row
    i has prompt i, over again after the last, whatever its label is; only then the reward has ``at(indices)``.
    """

    name: str
    prompts: tuple[str, ...]
    texts: Sequence[str] = ()  # the model's prompts by label; no field, since the rows' key holds them
    by_prompt = True

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,), of samples (B, C, H, W) and their prompts."""
        raise AssertionError

    def reading(self, texts: tuple[str, ...]) -> Self:
        """The same reward with the model's prompts at hand."""
        made = copy(self)
        made.__dict__["texts"] = texts
        return made

    @property
    def needs_labels(self) -> bool:
        """Whether labels say which prompt a row has."""
        return not self.prompts

    def check_prompts(self) -> None:
        """Refuse a reward without prompts."""
        if not (self.prompts or self.texts) or not all(self.prompts):
            raise ValueError(
                f"reward {self.name} compares a picture with its prompt, but there is none. Give the model "
                "prompts=FILE, or reward.prompts texts."
            )

    @property
    def at(self) -> Callable[[Tensor], OfPrompts]:
        """(B,) int64 sample indices -> the scorer of these rows."""
        if not self.prompts:  # hasattr is how others ask whether a reward depends on the row's index
            raise AttributeError("at")
        return self._at

    def _at(self, indices: Tensor) -> OfPrompts:
        self.check_prompts()
        return OfPrompts(self.score, [self.prompts[i % len(self.prompts)] for i in indices.tolist()])

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,), of samples whose labels, (B,) int64, are the numbers of the model's prompts.

        Raises:
            ValueError: the prompts are its own, or the rows have none.
        """
        if self.prompts:
            raise ValueError(
                f"{self.name} scores row i against the prompt of row i, but it was given {len(samples)} samples "
                "without their rows. Call .at(indices) first."
            )
        self.check_prompts()
        numbers = [] if cond is None else cond.tolist()
        if len(numbers) != len(samples) or not all(0 <= n < len(self.texts) for n in numbers):
            raise ValueError(
                f"reward {self.name} needs a prompt for each of {len(samples)} samples: a label below "
                f"{len(self.texts)}, got {numbers or None}. Set labels=cycle."
            )
        return self.score(samples, [self.texts[n] for n in numbers])
