"""Rows whose state stopped being a number: found after a batch, traced to the step by running the batch again.

A sample may also be spoilt after its last step, when it is decoded; then its state before is finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IN_NETWORK, IN_SOLVER, IN_DECODER = (
    "the network's answer at",
    "its state, though every answer of the network was finite",
    "its decoding, though its state before was finite",
)


def advice(why: str) -> str:
    """What to try where no row is left, by what is known of one."""
    if IN_DECODER in why:
        return (
            "Only decoding fails: fetch the decoder's weights again; where it works in half precision, set "
            "model.dtype=float32 or bfloat16."
        )
    if IN_NETWORK in why and why.endswith("evaluation 1)"):
        return (
            "The network's first answer is spoilt already: check its weights and those of its text encoders; where it "
            "works in half precision, set model.dtype=float32 or bfloat16."
        )
    if IN_NETWORK in why or IN_SOLVER in why:
        return "The solver diverged or the model overflowed: use a lower order, more steps or another grid."
    return ""


class NotFinite(ValueError):
    """Some rows of a range, perhaps all, are not finite: these rows can be set aside.

    Args:
        rows: sample index to what is known of it.
        key: the recipe.

    Attributes:
        rows: the same.
    """

    def __init__(self, rows: Mapping[int, str], key: str) -> None:
        first = min(rows)
        more = f", and {len(rows) - 1} more" if len(rows) > 1 else ""
        super().__init__(f"sample {first} of {key} is not finite: {rows[first]}{more}.")
        self.rows, self._key = dict(rows), key

    def __reduce__(self) -> Any:
        return (NotFinite, (self.rows, self._key))


class Watched:
    """A model that notes where each row's answers stop being finite.

    Args:
        model: the model.
        num_rows: B; a call with B K states is of K particles a row, rows outermost. Other calls are not looked at.
        times: the grid.

    Attributes:
        found: row to the step, the time and the number of the first evaluation that was not finite.
    """

    def __init__(self, model: Any, num_rows: int, times: Sequence[float]) -> None:
        self._model, self._rows, self._times = model, num_rows, times
        self._calls = 0
        self.found: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The model's answer."""
        answer = self._model.denoise(x, t, cond)
        self._calls += 1
        if len(x) % self._rows == 0:
            bad = ~torch.isfinite(answer).flatten(1).all(dim=1)
            for place in bad.nonzero().flatten().tolist():
                here = float(t[place]) if isinstance(t, Tensor) and t.ndim else float(t)
                step = 1 + sum(time > here for time in self._times[:-1])
                self.found.setdefault(
                    place * self._rows // len(x),
                    f"step {step} of {len(self._times) - 1} (t={here:.6g}, evaluation {self._calls})",
                )
        return answer
