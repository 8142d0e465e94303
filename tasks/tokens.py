"""Token strings: reading them back from stored samples, and refusing those that a law does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tasks.data.digits import LEVELS, SIDE
from tasks.types import sample_shape


def token_ids(samples: Tensor) -> Tensor:
    """The tokens of stored samples, (B, L) int64.

    Whole numbers are tokens already, (B, L). Images in [-1, 1], (B, 1, 8, 8), are read as 17 grey levels each: exactly
    those of ``digits_tokens``, and the nearest ones of models that make continuous images.

    Raises:
        ValueError: samples of another shape.
    """
    if not samples.is_floating_point():
        return samples.long()
    refuse_other_samples(tuple(samples.shape[1:]))
    return torch.round((samples.flatten(1) + 1.0) * ((LEVELS - 1) / 2)).clamp(0, LEVELS - 1).long()


def refuse_other_samples(shape: tuple[int, ...]) -> None:
    """Tokens (L,), or images that have 17 grey levels."""
    if len(shape) != 1 and tuple(shape) != (1, SIDE, SIDE):
        raise ValueError(
            f"tokens are read from strings (L,) or from 8x8 grey images (1, 8, 8), but the model makes {tuple(shape)}. "
            "Use a token model such as digits_tokens or table."
        )


def alphabet(model: Any) -> tuple[int, int]:
    """Number of token values and length of a model's stored samples, read as tokens.

    Raises:
        ValueError: a model whose samples are no tokens.
    """
    shape = sample_shape(model)
    refuse_other_samples(shape)
    if len(shape) != 1:
        return LEVELS, SIDE * SIDE
    if model.noising.kind != "masked":
        raise ValueError(
            f"the samples of model {model.name} are vectors of numbers, not tokens. Use a token model: table or "
            "digits_tokens."
        )
    return getattr(model, "stored_vocabulary", model.noising.vocabulary), shape[0]


def refuse_other_alphabet(model: Any, judge: Any, what: str) -> None:
    """The samples of a model must be strings that the law of another one knows.

    Raises:
        ValueError: another vocabulary or length; says both and how to agree.
    """
    given, known = alphabet(model), alphabet(judge)
    if given != known:
        raise ValueError(
            f"{what} asks model {judge.name}, which knows {known[1]} tokens of {known[0]} values, but the samples of "
            f"model {model.name} are {given[1]} tokens of {given[0]}. Set {what}'s model to one with the same "
            "vocabulary and length, such as the study's own."
        )


def check_tokens(tokens: Tensor, vocabulary: int, length: int) -> None:
    """Refuse strings that a law does not know.

    Raises:
        ValueError: another length, or symbols outside of the vocabulary, such as a mask that is left.
    """
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise ValueError(f"strings must be (B, {length}) tokens, got shape {tuple(tokens.shape)}.")
    if len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) < vocabulary):
        raise ValueError(
            f"tokens must be between 0 and {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}. Only "
            "finished samples have a probability; a mask that is left must be filled first."
        )
