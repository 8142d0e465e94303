"""CFG++: guidance that re-noises with the unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.branches import unconditional
from tasks.registry import guidance
from tasks.types import Model


@guidance.register("cfgpp")
@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++: ``x_s = alpha_s x0_g + sigma_s eps_u`` with ``x0_g = x0_u + scale (x0_c - x0_u)`` and ``eps_u`` unguided.

    The guided model gives both predictions. A solver steps with the unconditional one, its history included, and the
    end of the step is then moved by ``alpha_s (x0_g - x0_u)``. For DDIM, deterministic or not, that is the published
    update; for multistep solvers differences are those of unconditional predictions, where the published code mixes
    guided and unguided ones. Where a step evaluates the network more than once, the first evaluation guides.

    Args:
        scale: omega, between 0 (unconditional) and 1; user interfaces show 12.5 times it.

    Reference: Chung et al. 2024, "CFG++: Manifold-Constrained Classifier Free Guidance for Diffusion Models",
        algorithm 2.
    Cost: two network evaluations per call.
    Identities: with DDIM, classifier-free guidance of scale ``omega / (1 - exp(-h))`` at a step of h in log-SNR; with
        scale=0 the unconditional model.
    """

    scale: float = 0.6

    evaluations = 2
    needs_labels = True
    asks_unlabelled = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= 1.0:
            raise ValueError(
                f"guidance.scale of cfgpp must be between 0 and 1, got {self.scale}. For larger ones use guidance=cfg."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what does not step with the two predictions.

        Raises:
            ValueError: a strategy, solver or model that looks at one prediction only.
        """
        solver = recipe.parts.solver
        obstacles = (
            (recipe.parts.model.noising.kind != "gaussian", f"model {recipe.model['name']} is not Gaussian"),
            (
                recipe.strategy["name"] not in ("single", "best_of_n"),
                f"strategy {recipe.strategy['name']} evaluates the network outside of the solver's steps",
            ),
            (
                getattr(solver, "needs", "posterior_mean") != "posterior_mean" or getattr(solver, "adaptive", False),
                f"solver {recipe.solver['name']} has no steps of that form",
            ),
        )
        for stands, why in obstacles:
            if stands:
                raise ValueError(
                    f"guidance cfgpp steps with two predictions, but {why}. Use solver=ddim and strategy=single, or "
                    "guidance=cfg."
                )

    def wrap(self, model: Model) -> Model:
        """The guided model."""
        return _Guided(model, self)


class _Guided:
    def __init__(self, model: Model, spec: CFGPlusPlus) -> None:
        self._model, self._spec = model, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The guided clean prediction."""
        return self.both(x, t, cond)[0]

    def both(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """The clean prediction, and the one whose noise carries the state to the next level."""
        without = self._model.denoise(x, t, unconditional(self._model, cond, "cfgpp"))
        conditional = self._model.denoise(x, t, cond)
        return without + self._spec.scale * (conditional - without), without
