"""What methods share that save parts of a network's evaluations: copies with hooks of their own, and what was done.

Such a method remembers earlier evaluations of a trajectory. It lives in a wrapper that is made anew for every batch, so
nothing is left behind in the model that other recipes share.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def twin(network: nn.Module) -> Any:
    """A copy of a network's modules around the very same weights: hooks on it do not touch the original."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return copy.deepcopy(network, shared)


class Meter:
    """Counts the multiply-adds of a network's linear layers and convolutions, where nearly all work is.

    Args:
        network: the one that is watched; its hooks stay on it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.spent, self.whole = 0, 0
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, output: Tensor) -> None:
        self.spent += output.numel() * (module.weight.numel() // module.weight.shape[0])

    def share(self) -> float:
        """The latest evaluation's work in units of the first one's, which was whole; then it counts from zero."""
        self.whole, spent, self.spent = self.whole or self.spent, self.spent, 0
        return spent / self.whole


def check_steps(recipe: Any, name: str) -> None:
    """Refuse what does not evaluate the network once a step along one falling trajectory.

    Raises:
        ValueError: a strategy, solver, grid or initial state that asks at other times too.
    """
    p = recipe.parts
    several = p.solver.nfe(3) != 3 if not getattr(p.solver, "adaptive", False) else True
    obstacles = (
        (p.model.noising.kind != "gaussian", f"model {recipe.model['name']} is not Gaussian"),
        (recipe.strategy["name"] != "single", f"strategy {recipe.strategy['name']} asks for other states too"),
        (several, f"solver {recipe.solver['name']} asks more than once a step"),
        (getattr(p.times, "travels", False), f"times {recipe.times['name']} come back to earlier levels"),
        (p.initial.evaluations > 0, f"initial {recipe.initial['name']} asks before the first step"),
    )
    for stands, why in obstacles:
        if stands:
            raise ValueError(
                f"guidance {name} remembers one evaluation a step of one trajectory, but {why}. Use strategy=single, "
                "solver=ddim or dpmpp_2m, times=uniform and initial=prior."
            )


def branch_of(model: Any, cond: Tensor | None) -> str:
    """Which of a step's evaluations this is: with labels, or without."""
    return "conditional" if cond is None or bool((cond != model.num_classes).any()) else "unconditional"
