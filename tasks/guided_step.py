"""One step of a sampler with its gradient: what methods that look through the network share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tasks.types import Noise, State


def detached(tree: Any) -> Any:
    """The same nest of tensors without the record of how they were made."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: detached(getattr(tree, f.name)) for f in fields(tree)})
    if isinstance(tree, Mapping):
        return {key: detached(value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(detached(value) for value in tree)
    return tree


def step_with_gradient(
    sampler: Any, state: State, noise: Noise, distance: Callable[[Tensor], Tensor]
) -> tuple[State, Tensor]:
    """A step, and the gradient at its start of a distance that is read off the clean prediction.

    Args:
        sampler: takes the step; its prediction must be a function of the state.
        state: where the trajectories stand.
        noise: their streams.
        distance: x0_hat (B, *shape) -> one number a row, (B,); the gradient of a row is that of its own number.

    Returns:
        the state after the step, and the gradient at ``state.x``, (B, *shape).
    """
    with torch.enable_grad():
        x = state.x.detach().requires_grad_()
        moved = sampler.step(replace(state, x=x), noise)
        (gradient,) = torch.autograd.grad(distance(moved.x0_hat).sum(), x)
    return detached(moved), gradient


def check_recipe(recipe: Any) -> None:
    """Refuse recipes whose clean prediction cannot be differentiated, or that have no measurement.

    Raises:
        ValueError: says what is missing.
    """
    name, parts = recipe.strategy["name"], recipe.parts
    if parts.solver.process != "gaussian" or recipe.solver["name"] == "diffusers":
        raise ValueError(
            f"strategy {name} differentiates the clean prediction of every step, which solver {recipe.solver['name']} "
            "does not give. Use solver=ddim solver.eta=1."
        )
    if getattr(parts.times, "travels", False):
        raise ValueError(f"strategy {name} cannot follow times {recipe.times['name']}, which rise. Use times=uniform.")
    if parts.reward is not None and recipe.reward["name"] != "measurement":
        raise ValueError(
            f"strategy {name} needs a measurement to fit, but the reward is {recipe.reward['name']}. Set "
            "reward=measurement."
        )
