"""Skip-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.branches import edited
from tasks.registry import guidance
from tasks.skips import scaled_skips, skips_of
from tasks.types import Model


@guidance.register("skip_tuning")
@dataclass(frozen=True)
class SkipTuning:
    """Skip-tuning: a UNet's skip connections are scaled before they are concatenated.

    Skip i of k, from the deepest (i = 1) to the outermost (i = k), is multiplied by
    ``bottom + (i / k) (top - bottom)``, which never quite is ``bottom``.

    Args:
        bottom: rho at the bottom. The published values could not be checked; 0.5 to 1 is worth a search.
        top: rho of the outermost skip.
        scales: a scale for every skip, from the deepest on, instead of these two.

    Reference: Ma et al. 2024, "The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling", section 3.
    Cost: none.
    Identities: with all scales at 1 the model itself, bit for bit.
    """

    bottom: float = 0.8
    top: float = 1.0
    scales: tuple[float, ...] | None = None

    evaluations = 1
    needs_labels = False
    edits_network = touches_layers = True

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a model without skip connections.

        Raises:
            ValueError: it is no UNet, or has another number of skips.
        """
        network = getattr(recipe.parts.model, "skeleton", None)
        count = 0 if network is None else sum(skips_of(network))
        if not count:
            raise ValueError(
                f"guidance skip_tuning scales the skip connections of a UNet, but model {recipe.model['name']} has "
                "none. Use a model that is a UNet, such as digits."
            )
        if self.scales is not None and len(self.scales) != count:
            raise ValueError(
                f"guidance.scales of skip_tuning must be {count} numbers, one for every skip connection of model "
                f"{recipe.model['name']}, got {len(self.scales)}."
            )

    def of(self, count: int) -> tuple[float, ...]:
        """The scales of ``count`` skips, from the deepest on."""
        if self.scales is not None:
            return self.scales
        return tuple(self.bottom + (i / count) * (self.top - self.bottom) for i in range(1, count + 1))

    def wrap(self, model: Model) -> Model:
        """The tuned model."""
        return _Tuned(model, self)


class _Tuned:
    def __init__(self, model: Model, spec: SkipTuning) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The tuned network's clean prediction."""
        with edited(self._model, lambda net: scaled_skips(net, self._spec.of(sum(skips_of(net))))):
            return self._model.denoise(x, t, cond)
