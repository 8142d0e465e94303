"""Region-adaptive sampling."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tasks import dit, mmdit
from tasks.registry import guidance
from tasks.savings import Meter, branch_of, check_steps, twin
from tasks.types import Model

JOINT = "SD3Transformer2DModel"


@guidance.register("ras")
@dataclass(frozen=True)
class RAS:
    """Region-adaptive sampling: most steps of a transformer compute the tokens that matter; others keep their noise.

    For DiT and for Stable Diffusion 3, whose text tokens are always computed.

    After a few whole steps, each step takes the ``ratio`` of tokens with the highest
    ``std(prediction of the token) exp(starve k)``, where k is how many steps it was left out; attention sees the keys
    and values that the left-out tokens had last. Their predicted output is the last one. Each row chooses for itself.

    Args:
        ratio: share of the tokens that a step computes.
        start: number of first steps that compute all.
        every: after these, one step in so many computes all; 0 never does.
        starve: how fast a left-out token becomes urgent.

    Reference: Liu et al. 2025, "Region-Adaptive Sampling for Diffusion Transformers", algorithm 1 (its resets are at
        steps 12 and 22 of 28).
    Cost: as many evaluations, of about ``ratio`` of the work each: ``cost/work``.
    Identities: with ratio=1 the model itself, up to rounding.
    """

    ratio: float = 0.5
    start: int = 4
    every: int = 10
    starve: float = 0.1

    evaluations = 1
    needs_labels = False
    edits_network = touches_layers = True
    remembers = True
    saves = True

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0 or self.start < 1 or self.every < 0:
            raise ValueError(
                f"ras needs 0 < ratio <= 1, start >= 1 and every >= 0, got {self.ratio}, {self.start} and {self.every}."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse networks whose tokens cannot be left out.

        Raises:
            ValueError: neither of these, or a solver that asks at other times than once a step.
        """
        network = getattr(recipe.parts.model, "skeleton", None)
        if type(network).__name__ not in ("DiTTransformer2DModel", JOINT):
            raise ValueError(
                f"guidance ras leaves out tokens of a DiTTransformer2DModel or an {JOINT}, but model "
                f"{recipe.model['name']} is none. Use a model that is one, such as digits_dit."
            )
        check_steps(recipe, "ras")

    def wrap(self, model: Model) -> Model:
        """The model that computes regions."""
        return _Regional(model, self)


class _Regional:
    def __init__(self, model: Model, spec: RAS) -> None:
        self._model, self._spec = model, spec
        self._branches: dict[str, _Trajectory] = {}
        self._network: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The clean prediction, parts of it remembered."""
        if getattr(self._model, "is_rehearsal", False):
            return self._model.denoise(x, t, cond)
        if self._network is None:
            self._network = twin(self._model.network)  # type: ignore[attr-defined]
            self._meter = Meter(self._network)
        branch, now = branch_of(self._model, cond), float(t.max()) if isinstance(t, Tensor) else float(t)
        if branch not in self._branches or now >= self._branches[branch].time:
            self._branches[branch] = _Trajectory(self._network, self._spec)
        trajectory, trajectory.time = self._branches[branch], now
        inner = copy.copy(self._model.inner)  # type: ignore[attr-defined]
        inner.network = trajectory
        return self._model.other(inner.denoise, x, t, cond, self._meter.share)  # type: ignore[attr-defined]


class _Trajectory:
    """What one batch remembers, in the place of the network: predictions, keys and values, and who was left out."""

    def __init__(self, network: Any, spec: RAS) -> None:
        self._network, self._spec = network, spec
        self._is_joint = type(network).__name__ == JOINT
        self.time, self._step = 1.0, 0
        self._cache: dit.Cache | None = None
        self._patches = self._left_out = torch.zeros(0)

    def __call__(
        self, x: Any = None, timestep: Any = None, class_labels: Any = None, return_dict: bool = True, **more: Any
    ) -> Any:
        """The network's output, (B, C, H, W), asked for and given as diffusers' networks are."""
        state = more.get("hidden_states", x)
        spec, step = self._spec, self._step
        whole = step < spec.start or (spec.every > 0 and (step - spec.start + 1) % spec.every == 0)
        active = None if whole or spec.ratio == 1.0 else self._urgent()
        if self._is_joint:
            given = (more["encoder_hidden_states"], more["pooled_projections"])
            found, self._cache = mmdit.tokens(self._network, state, timestep, *given, active, self._cache)
        else:
            found, self._cache = dit.tokens(self._network, state, timestep, class_labels, active, self._cache)
        if active is None:
            self._patches, self._left_out = found, torch.zeros(found.shape[:2], device=found.device)
        else:
            self._patches = dit.put(self._patches, active, found)
            self._left_out = (self._left_out + 1).scatter(1, active, 0.0)
        self._step += 1
        if self._is_joint:
            output = mmdit.image(self._network, self._patches, *state.shape[-2:])
        else:
            output = dit.image(self._network, self._patches)
        return SimpleNamespace(sample=output) if return_dict else (output,)

    def _urgent(self) -> Tensor:
        score = self._patches.std(dim=2) * torch.exp(self._spec.starve * self._left_out)
        count = max(1, math.ceil(self._spec.ratio * score.shape[1]))
        return score.argsort(dim=1, descending=True, stable=True)[:, :count]
