"""Perturbed-attention guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.attention import chosen_attentions, identity_maps
from tasks.branches import around, edited
from tasks.registry import guidance
from tasks.types import Model


@guidance.register("pag")
@dataclass(frozen=True)
class PerturbedAttention:
    """Perturbed-attention guidance: ``x0 = x0 + scale (x0_c - x0_p)``, away from a network that cannot compare tokens.

    ``x0_p`` is predicted with the self-attention maps of some layers replaced by the identity, under the same labels.
    With ``guidance=chain`` it adds to classifier-free guidance for one evaluation more.

    Args:
        scale: s; 0 leaves the perturbed branch out and is the model itself.
        layers: layers by (parts of) their paths, such as mid_block or up_blocks.0; empty takes a UNet's middle block,
            or the middle layer of a transformer.

    Reference: Ahn et al. 2024, "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", eq. 11.
    Cost: two network evaluations per call, one with scale=0.
    Identities: with scale=0 the model itself.
    """

    scale: float = 3.0
    layers: tuple[str, ...] = ()

    needs_labels = False
    touches_layers = True

    @property
    def evaluations(self) -> int:
        """Of one call."""
        return 2 if self.scale else 1

    def check_recipe(self, recipe: Any) -> None:
        """Refuse a model without such layers.

        Raises:
            ValueError: it has no self-attention, or none of these names.
        """
        owner = f"model {recipe.model['name']}"
        network = getattr(recipe.parts.model, "skeleton", None)
        if network is None:
            raise ValueError(
                f"guidance pag perturbs the self-attention of a network, but {owner} is none. Use a model that is one, "
                "such as digits."
            )
        chosen_attentions(network, self.layers, owner)

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: PerturbedAttention) -> None:
        self._model, self._branches = around(model)
        self._spec = spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        found = self._model.denoise(x, t, cond)
        if not self._spec.scale:
            return found
        plain = self._branches.denoise(x, t, cond)
        kind = f"perturbed {self._spec.layers}"
        return found + self._spec.scale * (plain - self._branches.ask(kind, self._perturbed, x, t, cond))

    def _perturbed(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        with edited(self._branches, self._edit):
            return self._branches.beneath.denoise(x, t, cond)

    def _edit(self, network: Any) -> Any:
        return identity_maps(network, chosen_attentions(network, self._spec.layers, "the network"))
