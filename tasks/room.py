"""Whether a device has room for the particles that a strategy holds at once."""

from __future__ import annotations

import math
from typing import Any

import torch

COPIES = 8  # states, predictions, their decoded form, and what indexing and a step copy of them


def free_bytes(device: str) -> int:
    """Memory that may be taken on a device now."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def check_room(recipe: Any) -> None:
    """Refuse more particles than fit beside one another.

    Calls of the network are split into batches whatever the number of particles; their states are not, because a group
    is weighed and resampled as a whole. What gradients keep of a network comes on top and is not judged here.

    Raises:
        ValueError: says how many particles fit.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        return  # which is refused where the model is loaded
    particles = recipe.parts.strategy.particles
    rows = max(1, recipe.batch_size // particles)
    each = COPIES * math.prod(recipe.parts.model.shape) * getattr(torch, recipe.dtype).itemsize
    free = free_bytes(recipe.device)
    if rows * particles * each <= free:
        return
    fits = free // each
    if particles == 1:
        raise ValueError(
            f"batch_size={recipe.batch_size} is so many states of shape {tuple(recipe.parts.model.shape)} at once, "
            f"about {rows * each / 2**30:.3g} GiB, but {recipe.device} has {free / 2**30:.3g} GiB free; a batch is "
            f"filled up even where fewer rows are asked for. Set batch_size to at most {fits}."
        )
    raise ValueError(
        f"strategy {recipe.strategy['name']} holds {rows * particles} particles of shape "
        f"{tuple(recipe.parts.model.shape)} at once, about {rows * particles * each / 2**30:.3g} GiB, but "
        f"{recipe.device} has {free / 2**30:.3g} GiB free. {fits} particles fit: use fewer of them a sample"
        + (", or a smaller batch_size." if rows > 1 else ".")
    )
