"""SADA: steps whose trajectory is stable do without the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tasks.registry import hooks


@hooks.register("sada")
@dataclass(frozen=True)
class SADA:
    """Stability-guided adaptive skipping: a row whose trajectory is stable reuses its last noise prediction.

    With ``y = x / alpha`` over ``u = sigma / alpha`` the drift f is the noise prediction. After every step the solver's
    ``y_{i+1}`` is compared with ``y_i + (u_{i+1} - u_i) (5 f_i + 6 f_{i-1} - 3 f_{i-2}) / 8``; where the mean of the
    difference times the second difference of f is not positive, the row is stable and its next call is left out:
    ``x0 = (x - sigma f_i) / alpha``. Each row decides for itself; the published code takes the mean over a batch, puts
    the extrapolated state in the place of the solver's, and has a second rule, interpolation of clean predictions, that
    is not here. Nor is its token-wise half, which merges the tokens of unstable steps inside of attention layers; see
    guidance=ras for regions on transformers.

    Args:
        start: share of the steps that are all made first.
        stop: share of the steps after which all are made again.
        max_skips: how many calls in a row may be left out.

    Reference: Jiang et al. 2025, "SADA: Stability-guided Adaptive Diffusion Acceleration", section 3.2 (step-wise).
    Cost: between one evaluation and none a step; ``nfe`` of a row is what it took, the plan's is an upper bound.
    Identities: with max_skips=0 the solver without it.
    """

    start: float = 0.2
    stop: float = 0.94
    max_skips: int = 4

    saves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(f"sada needs 0 <= start <= stop <= 1, got {self.start} and {self.stop}.")
        if self.max_skips < 0:
            raise ValueError(f"sada.max_skips must not be negative, got {self.max_skips}.")

    def begin(self, plan: Any) -> None:
        """Nothing is remembered before the first evaluation."""
        return None

    def check(self, plan: Any) -> None:
        """Refuse schedules with more than one evaluation a step.

        Raises:
            ValueError: a singlestep solver or an implicit corrector.
        """
        if any(len(group) > 1 for group in plan.groups) or any(s.corrector == "implicit" for s in plan.steps):
            raise ValueError(
                "hook sada leaves out steps of one evaluation, but this schedule has steps of several. Use a multistep "
                "preset such as dpmpp_2m, without an implicit corrector."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse strategies and guidance that need an answer of every row at every step.

        Raises:
            ValueError: says which.
        """
        if recipe.strategy["name"] != "single":
            raise ValueError(
                f"hook sada lets every row decide what it costs, which strategy {recipe.strategy['name']} cannot plan. "
                "Use strategy=single."
            )
        guided = recipe.guidance
        names = {guided["name"]} | {part["name"] for part in guided.get("parts", ())}
        if "cfgpp" in names or getattr(recipe.parts.guidance, "remembers", False):
            raise ValueError(
                f"hook sada asks the network about some rows only, which guidance {guided['name']} cannot follow. Use "
                "guidance=cfg."
            )

    def answer(self, plan: Any, i: int, model: Any, x: Tensor, t: Any, memory: Any) -> tuple[Tensor, Any]:
        """The clean prediction of every row: the network's, or the one that its last noise prediction implies."""
        u, y = plan.sigma[i] / plan.alpha[i], x / plan.alpha[i]
        if memory is None:
            memory = {
                "f": (),
                "y": y,
                "skipped": torch.zeros(len(x), dtype=torch.int64, device=x.device),
                "nfe": torch.zeros(len(x), dtype=torch.int64, device=x.device),
            }
        skip = self._stable(plan, i, y, memory) & (memory["skipped"] < self.max_skips)
        x0 = x - plan.sigma[i] * memory["f"][0] if memory["f"] else x
        x0 = x0 / plan.alpha[i]
        asked = (~skip).nonzero()[:, 0]
        nfe = memory["nfe"]
        if len(asked):
            before = model.evaluations
            x0[asked] = model.some(asked).denoise(x[asked], t[asked] if isinstance(t, Tensor) and t.ndim else t)
            nfe = nfe.clone()
            nfe[asked] += (model.evaluations - before) // len(asked)
        f = (y - x0) / u
        skipped = torch.where(skip, memory["skipped"] + 1, torch.zeros_like(memory["skipped"]))
        return x0, {"f": (f, *memory["f"][:2]), "y": y, "skipped": skipped, "nfe": nfe}

    def _stable(self, plan: Any, i: int, y: Tensor, memory: Any) -> Tensor:
        """Which rows may leave out the evaluation of step i, (B,) bool."""
        steps = len(plan.steps)
        if len(memory["f"]) < 3 or not self.start * steps <= i < self.stop * steps:
            return torch.zeros(len(y), dtype=torch.bool, device=y.device)
        a, b, c = memory["f"]
        change = plan.sigma[i] / plan.alpha[i] - plan.sigma[i - 1] / plan.alpha[i - 1]
        ahead = memory["y"] + change * (5 * a + 6 * b - 3 * c) / 8
        return ((y - ahead) * (a - 2 * b + c)).flatten(1).mean(dim=1) <= 0

    def spent(self, memory: Any) -> Tensor:
        """Evaluations of every row so far, (B,) int64."""
        return memory["nfe"]
