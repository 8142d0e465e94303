"""The heads of preference models: a chain of linear layers, of the sizes that their weights have."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Linear layers one after another, under the numbers that they have in the published weights.

    The dropout between them, whose numbers are missing, does nothing in evaluation.
    """

    def __init__(self, sizes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for number in sorted(sizes, key=int):
            outputs, inputs = sizes[number]
            self.add_module(number, nn.Linear(inputs, outputs))

    @classmethod
    def of(cls, state: dict[str, Tensor], prefix: str) -> LinearHead:
        """With the sizes of the layers ``PREFIX0.weight``, ``PREFIX2.weight``, ... of a state.

        Raises:
            ValueError: the state has no such layers.
        """
        sizes: dict[str, Any] = {
            name.removeprefix(prefix).removesuffix(".weight"): tuple(value.shape)
            for name, value in state.items()
            if name.startswith(prefix) and name.endswith(".weight")
        }
        if not sizes:
            raise ValueError(f"the weights hold no layers named {prefix}0.weight and so on: they are of another model.")
        return cls(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, 1)."""
        for layer in self.children():
            x = layer(x)
        return x
