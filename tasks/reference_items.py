"""The clean items of a model's reference data, one for every row: what inverse problems measure."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np

from tasks.registry import models
from tasks.types import sample_shape


@lru_cache(maxsize=4)
def items(spec: str) -> np.ndarray:
    """The items of the model that a canonical spec names, (N, *shape) float64.

    Raises:
        ValueError: the model knows no data.
    """
    model = models.build(json.loads(spec))
    if not hasattr(model, "reference"):
        raise ValueError(f"model {model.name} has no reference data to measure. Choose a model that has.")
    found = np.asarray(model.reference()[0], dtype=np.float64)
    return found.reshape(-1, *sample_shape(model))
