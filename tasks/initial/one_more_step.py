"""One more step: from noise without any signal to the noisiest state that the model was trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks import side_network
from tasks.processes import VP
from tasks.registry import initials
from tasks.types import Noise


@initials.register("one_more_step")
@dataclass(frozen=True)
class OneMoreStep:
    """One more step: ``x_T = alpha_T x0 + sigma_T z`` with ``x0 = -v(z)`` from a small network that sees noise alone.

    Most schedules end with a little signal left, but sampling begins at noise with none, so a model never hears of the
    mean that belongs there: very dark and very bright images are out of reach. A small network, trained to predict the
    velocity at zero signal, supplies it. Its best answer is minus the mean of the data of a label.

    Args:
        path: folder with the small network; null takes that of the digits (``solvus train digits_one_more_step``).

    Reference: Hu et al. 2024, "One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws
        and Enhancing Low-Frequency Controls", algorithm 2, without noise of its own (eta = 0).
    Cost: one evaluation, of a network much smaller than the one that it is counted as; guidance does not act on it.
    Identities: with a network that answers 0, the start at sigma_T z.
    """

    path: str | None = None

    evaluations = 0
    side_evaluations = 1

    def __post_init__(self) -> None:
        _ = side_network.weights_of(self.path)

    @property
    def revision(self) -> str:
        """Hash of the small network's weights."""
        return hashlib.sha256(side_network.weights_of(self.path).read_bytes()).hexdigest()[:16]

    def start(self, process: Any) -> float:
        """The noisiest time."""
        return 1.0

    def check_recipe(self, recipe: Any) -> None:
        """Refuse models that the small network does not belong to.

        Raises:
            ValueError: another shape, other labels, or a process that ends without signal anyway.
        """
        model, name = recipe.parts.model, recipe.model["name"]
        if model.shape != (1, 8, 8) or model.num_classes != 10 or not isinstance(model.noising, VP):
            raise ValueError(
                "initial one_more_step begins with a network for 8x8 digits of ten classes on a VP schedule, but model "
                f"{name} has shape {model.shape}, {model.num_classes} classes and {type(model.noising).__name__}. Use "
                "model=digits, or initial=prior."
            )

    def __call__(self, sampler: Any, noise: Noise) -> Tensor:
        """(B, *shape) states at the first time of the grid."""
        model, t = sampler.model, sampler.times[0]
        process = model.process
        z = noise.normal(tuple(model.shape), purpose="prior")
        net = side_network.load(self.path, z.device)

        def answer(x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
            labels = torch.full((len(x),), model.num_classes, device=x.device) if cond is None else cond
            return -net(x.float(), labels).to(x.dtype)

        return process.alpha(t) * model.other(answer, z, t, sampler.cond) + process.sigma(t) * z
