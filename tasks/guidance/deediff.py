"""Early exit by learned uncertainty."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import early_exit
from tasks.checkpoint import file_digest
from tasks.registry import guidance
from tasks.types import Model


@guidance.register("deediff")
@dataclass(frozen=True)
class DeeDiff:
    """DeeDiff: a row leaves a transformer after the first block whose head is expected to be right.

    After every block but the last a probe estimates ``tanh(|g_i(h_i) - eps|)``, the error of that block's own output
    head; a row whose mean over all predicted numbers is below ``threshold`` takes the head's prediction, and later
    blocks are not run for it. Every row decides for itself, at every evaluation. The error is that against the true
    noise, as published, so rows leave early where noise is easy to tell, near t = 1, and stay where it is not.

    Heads and probes are trained on a network whose weights stay as they are; the paper trains them together.

    Args:
        threshold: tau, from 0 (never leave early) to 1 (always after the first block).
        path: folder with heads and probes; null takes those of digits_dit (``solvus train digits_dit_probes``).

    Reference: Tang et al. 2023, "DeeDiff: Dynamic Uncertainty-Aware Early Exiting for Accelerating Diffusion Model
        Generation".
    Cost: as many evaluations, of less work where rows leave: ``cost/work``, probes and heads included.
    Identities: with threshold=0 the model itself.
    """

    threshold: float = 0.1
    path: str | None = None

    evaluations = 1
    needs_labels = False
    edits_network = touches_layers = True
    saves = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"guidance.threshold must be between 0 and 1, got {self.threshold}.")
        _ = early_exit.file_of(self.path)

    @property
    def revision(self) -> str:
        """Hash of the weights of heads and probes."""
        return file_digest(early_exit.file_of(self.path))[:16]

    def check_recipe(self, recipe: Any) -> None:
        """Refuse networks that the probes do not belong to, and what else acts on the blocks.

        Raises:
            ValueError: says which.
        """
        model, name = recipe.parts.model, recipe.model["name"]
        if type(getattr(model, "skeleton", None)).__name__ != "DiTTransformer2DModel":
            raise ValueError(
                f"guidance deediff leaves a DiTTransformer2DModel after some of its blocks, but model {name} is none. "
                "Use a model that is one, such as digits_dit."
            )
        known = early_exit.trained_on(self.path)
        if known != model.revision:
            raise ValueError(
                f"guidance deediff has probes of a network with revision {known or 'unknown'}, but model {name} has "
                f"{model.revision}. Set guidance.path to probes of that network, or use the embedded model=digits_dit."
            )
        others = [spec["name"] for spec in recipe.guidance.get("parts", ())]
        also = [other for other in ("int8", "autoguidance") if other in others]
        if also or recipe.masks:
            what = f"guidance {also[0]} runs" if also else "the schedule runs"
            raise ValueError(f"guidance deediff decides which blocks are run, but {what} others. Leave one out.")

    def wrap(self, model: Model) -> Model:
        """The model that is left early."""
        return _Leaving(model, self)


class _Leaving:
    def __init__(self, model: Model, spec: DeeDiff) -> None:
        self._model, self._spec = model, spec
        self._inner: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The clean prediction of the block after which each row leaves."""
        if self._spec.threshold == 0 or getattr(self._model, "is_rehearsal", False):
            return self._model.denoise(x, t, cond)
        if self._inner is None:
            self._inner = copy.copy(self._model.inner)  # type: ignore[attr-defined]
            network = self._inner.network
            exits = early_exit.load(self._spec.path, network)
            self._inner.network = early_exit.EarlyExit(network, exits, self._spec.threshold)
        return self._model.other(self._inner.denoise, x, t, cond, self._share)  # type: ignore[attr-defined]

    def _share(self) -> float:
        """The mean work of a row of the latest evaluation, in units of the whole network."""
        left, self._inner.network.left = torch.cat(self._inner.network.left), []
        return float(torch.tensor(early_exit.shares(self.skeleton))[left.cpu() - 1].double().mean())
