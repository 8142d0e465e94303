"""Calls of a network in portions of rows, which are halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("solvus")


class Portions:
    """Runs a function of rows in portions; when memory runs out, portions are halved, within a bound, for good.

    The last bits of a network's answer depend on how many rows it is given, so what was halved is recorded with the
    rows.

    Args:
        what: the work, for messages.
        halvings: how often a portion may be halved; 0 refuses at once, with the number of rows that fits.
        rows: most rows of a portion to begin with; 0 takes all.

    Attributes:
        size: most rows of a portion; 0 for all.
        halved: how often memory ran out.
    """

    def __init__(self, what: str, halvings: int, rows: int = 0) -> None:
        self.what, self.size, self.halved = what, rows, 0
        self._halvings = halvings

    def __call__(self, function: Callable[[slice], Tensor], rows: int) -> Tensor:
        """The function's answers for rows 0 to ``rows``, put together.

        Raises:
            ValueError: memory runs out below the bound; names the number of rows that fits.
        """
        while True:
            size = min(self.size or rows, rows)
            try:
                parts = [function(slice(i, min(i + size, rows))) for i in range(0, rows, size)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:  # outside of the handler, which would keep the failed call's tensors alive
                if self.halved > self._halvings:
                    raise ValueError(
                        f"{self.what} ran out of memory with {size * 2**self.halved} rows at once; {size} fit. Set "
                        f"batch_size={size}, or model.halvings={self.halved} to let the batch be cut."
                    )
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise ValueError(
                    f"{self.what} ran out of memory with a single row. Use smaller images, model.dtype=bfloat16, "
                    "model.offload or a larger device."
                )
            self.size, self.halved = size // 2, self.halved + 1
            log.warning("%s: out of memory with %d rows at once, trying %d", self.what, size, self.size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device, or the machine, has no more memory."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text
