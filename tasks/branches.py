"""What guided models share: predictions asked once a state, and edits of the network that last for one evaluation.

A guidance wrapper is a *direction* that it adds to what the model inside of it predicts. Directions look at the plain
network: its conditional and unconditional predictions and those of a weakened version. Several directions on one state
ask for the conditional prediction again and again; :class:`Branches` makes it once, and the account is charged once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tasks.types import Model

Edit = Callable[[Any], AbstractContextManager[Any]]


def edited(model: Any, edit: Edit) -> AbstractContextManager[Any]:
    """Within, the model's network is edited; where costs are rehearsed there is no network, and nothing happens."""
    return nullcontext() if getattr(model, "is_rehearsal", False) else edit(model.network)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return type(a) is type(b) and a == b


class Branches:
    """A model that remembers its predictions at the latest state, by time, labels and kind of edit.

    What it returns is shared: callers must not change it in place.
    """

    def __init__(self, model: Model) -> None:
        self._model = self.beneath = model  # beneath: what a direction asks under an edit of its own
        self._x: Tensor | None = None
        self._version = 0
        self._answers: list[tuple[tuple[Any, ...], Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def branches(self) -> Branches:
        """Itself: how a wrapper around others finds it."""
        return self

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The network's prediction, (B, *shape)."""
        return self.ask("", self._model.denoise, x, t, cond)

    def ask(
        self, kind: str, denoise: Callable[..., Tensor], x: Tensor, t: float | Tensor, cond: Tensor | None
    ) -> Tensor:
        """A prediction of some kind at x: made by ``denoise``, or remembered.

        Args:
            kind: names what is special about it; "" is the network as it is.
            denoise: makes it.
            x: states, (B, *shape).
            t: one time, or one a row, (B,).
            cond: labels, (B,) int64, or None.
        """
        if x is not self._x or x._version != self._version:
            self._x, self._version, self._answers = x, x._version, []
        asked = (kind, torch.is_grad_enabled(), t, cond)
        for known, answer in self._answers:
            if all(map(_same, known, asked)):
                return answer
        answer = denoise(x, t, cond)
        self._answers.append((asked, answer))
        return answer


def around(model: Any) -> tuple[Any, Branches]:
    """A model with its branches: those inside of it, or new ones around it, which are then the model too."""
    found = getattr(model, "branches", None)
    if isinstance(found, Branches):
        return model, found
    found = Branches(model)
    return found, found


def unconditional(model: Any, cond: Tensor | None, name: str) -> Tensor:
    """The labels that mean "no label".

    Raises:
        ValueError: the rows have no labels.
    """
    if cond is None:
        raise ValueError(f"guidance {name} needs labels, but this row has none. Set labels=cycle.")
    return torch.full_like(cond, model.num_classes)
