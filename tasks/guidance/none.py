"""No guidance."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.registry import guidance
from tasks.types import Model


@guidance.register("none")
@dataclass(frozen=True)
class NoGuidance:
    """The model as it is: conditional on the labels where it takes them.

    Reference: none needed; this is the identity.
    """

    evaluations = 1
    needs_labels = False

    def wrap(self, model: Model) -> Model:
        """The same model."""
        return model
