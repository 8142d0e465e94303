"""Encoded prompts below ``<root>/store/texts``: every distinct text is encoded once for all studies of a root."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from orchestrator.store import Store

TEXTS = "texts"


class EncodedTexts:
    """The encoded prompts of one store. They are a cache: a lost or damaged one is encoded again."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def load(self, key: str) -> Mapping[str, np.ndarray] | None:
        """The arrays of an encoded text, or None if they are not there, or not sound."""
        return self._store.get_arrays(TEXTS, key)

    def save(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of an encoded text."""
        self._store.put_arrays(TEXTS, key, dict(arrays))
