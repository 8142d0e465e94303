"""Rewards that read the prompt of a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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
    """What every reward that reads prompts answers: row i has prompt i, over again after the last."""

    name: str
    prompts: tuple[str, ...]

    def score(self, samples: Tensor, prompts: list[str]) -> Tensor:
        """(B,), of samples (B, C, H, W) and their prompts."""
        raise AssertionError

    def check_prompts(self) -> None:
        """Refuse a reward without prompts."""
        if not self.prompts or not all(self.prompts):
            raise ValueError(f"reward {self.name} compares a picture with its prompt: reward.prompts must hold texts.")

    def at(self, indices: Tensor) -> OfPrompts:
        """The scorer of the rows with these indices, (B,) int64."""
        self.check_prompts()
        return OfPrompts(self.score, [self.prompts[i % len(self.prompts)] for i in indices.tolist()])

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """Refused: the prompt is the row's own."""
        raise ValueError(
            f"{self.name} scores row i against the prompt of row i, but it was given {len(samples)} samples without "
            "their rows. Call .at(indices) first."
        )
