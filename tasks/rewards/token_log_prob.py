"""Log-probability of a token string under a law that can be written down."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks import registry
from tasks.recipe import canonical, digest
from tasks.registry import rewards
from tasks.tokens import alphabet, refuse_other_alphabet, refuse_other_samples, token_ids
from tasks.types import Model


@lru_cache(maxsize=4)
def _load(spec: str, device: str) -> Model:
    return registry.models.build(json.loads(spec)).load(device)


@rewards.register("token_log_prob")
@dataclass(frozen=True)
class TokenLogProb:
    """log p(x) of a token string in nats: the exact joint of a table, the autoregressive model of the digits.

    Args:
        model: spec of the token model whose law is asked, ``{name: digits_tokens}`` or ``{name: table, ...}``.
        conditional: take log p(x | label); null does so where that model has labels.

    Reference: Lou et al. 2024, "Discrete Diffusion Modeling by Estimating the Ratios of the Data Distribution", section
        5 (samples judged by an autoregressive model).
    Cost: one call of the autoregressive network for each sample; a table costs nothing.
    """

    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits_tokens"})
    conditional: bool | None = None

    scores_predictions = True

    def __post_init__(self) -> None:
        judge = self.judge
        if not hasattr(judge, "log_prob_revision"):
            raise ValueError(
                f"reward.model must have a law that can be written down, but {self.model.get('name')} has none. Use "
                "digits_tokens, or table with the settings of the study's model."
            )
        if self.conditional and not judge.num_classes:
            raise ValueError(
                f"reward.conditional needs a model with labels, but {self.model['name']} has none. Set "
                "reward.conditional=null."
            )

    @property
    def judge(self) -> Any:
        """The model whose law is asked, without weights."""
        return registry.models.build(self.model)

    @property
    def needs_labels(self) -> bool:
        """Only when the law is conditional."""
        return bool(self.judge.num_classes) if self.conditional is None else self.conditional

    @property
    def revision(self) -> str:
        """Hash of the law."""
        return digest(["1", self.judge.log_prob_revision])[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """Samples whose tokens the law knows, as far as the shape tells."""
        refuse_other_samples(tuple(shape))
        length = alphabet(self.judge)[1]
        if math.prod(shape) != length:
            raise ValueError(
                f"reward token_log_prob asks model {self.model['name']}, which knows {length} tokens, but the samples "
                f"have {math.prod(shape)}. Set reward.model to the model of the study."
            )

    def check_model(self, model: Any) -> None:
        """A model with the vocabulary and length that the law knows.

        Raises:
            ValueError: says both.
        """
        refuse_other_alphabet(model, self.judge, "reward token_log_prob")

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64.

        Raises:
            ValueError: a string of probability 0, or tokens that the law does not know.
        """
        law: Any = _load(canonical(self.model), str(samples.device))
        found = law.energy_log_prob(token_ids(samples), cond if self.needs_labels else None)
        if torch.isinf(found).any():
            row = int(torch.isinf(found).nonzero()[0])
            raise ValueError(
                f"string {token_ids(samples)[row].tolist()} has probability 0 under model {self.model['name']}: the "
                "perplexity is infinite. Measure total_variation instead."
            )
        return found
