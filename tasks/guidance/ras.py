"""Region-adaptive sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import dit
from tasks.pipelines.family import first_half
from tasks.processes import expand, to_x0
from tasks.registry import guidance
from tasks.savings import Meter, branch_of, check_steps, twin
from tasks.types import Model


@guidance.register("ras")
@dataclass(frozen=True)
class RAS:
    """Region-adaptive sampling: most steps of a transformer compute the tokens that matter; others keep their noise.

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
            ValueError: no DiT, or a solver that asks at other times than once a step.
        """
        network = getattr(recipe.parts.model, "skeleton", None)
        if type(network).__name__ != "DiTTransformer2DModel":
            raise ValueError(
                f"guidance ras leaves out tokens of a DiTTransformer2DModel, but model {recipe.model['name']} is none. "
                "Use a model that is one, such as digits_dit."
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

        def answer(x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
            time = torch.zeros(len(x), device=x.device) + self.process.model_time(t)
            labels = torch.full((len(x),), self._model.num_classes, device=x.device) if cond is None else cond
            given = x.to(next(self._network.parameters()).dtype)
            output = first_half(trajectory.predict(given, time.float(), labels), x.shape[1]).to(x.dtype)
            alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
            return to_x0(self.prediction, x, output, alpha, sigma)

        return self._model.other(answer, x, t, cond, self._meter.share)  # type: ignore[attr-defined]


class _Trajectory:
    """What one batch remembers: predictions, keys and values, and how often each token was left out."""

    def __init__(self, network: Any, spec: RAS) -> None:
        self._network, self._spec = network, spec
        self.time, self._step = 1.0, 0
        self._cache: dit.Cache | None = None
        self._patches = self._left_out = torch.zeros(0)

    def predict(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The network's output, (B, C, H, W)."""
        spec, step = self._spec, self._step
        whole = step < spec.start or (spec.every > 0 and (step - spec.start + 1) % spec.every == 0)
        active = None if whole or spec.ratio == 1.0 else self._urgent()
        found, self._cache = dit.tokens(self._network, x, time, labels, active, self._cache)
        if active is None:
            self._patches, self._left_out = found, torch.zeros(found.shape[:2], device=x.device)
        else:
            self._patches = dit.put(self._patches, active, found)
            self._left_out = (self._left_out + 1).scatter(1, active, 0.0)
        self._step += 1
        return dit.image(self._network, self._patches)

    def _urgent(self) -> Tensor:
        score = self._patches.std(dim=2) * torch.exp(self._spec.starve * self._left_out)
        count = max(1, math.ceil(self._spec.ratio * score.shape[1]))
        return score.argsort(dim=1, descending=True, stable=True)[:, :count]
