"""SADA: steps whose trajectory is stable do without the network, and tokens that are stable in the other steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tasks import dit, pruned
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
    is not here.

    With ``max_token_skips`` the same test is made for every token (patch) of a transformer in the steps where the row
    is not stable: the network computes the tokens that fail it, and the others keep their last prediction, while
    attention sees the keys and values that they had last. The paper keeps the output of every layer instead, renews all
    of them in whole evaluations at intervals, and decides for a batch. Here a token is computed again when it was left
    out ``max_token_skips`` times in a row (steps that the row left out count), and a row computes at least a quarter of
    its tokens and always a multiple of a quarter, the least stable ones filling it up, so that rows share calls.

    Args:
        start: share of the steps that are all made first.
        stop: share of the steps after which all are made again.
        max_skips: how many calls in a row may be left out.
        max_token_skips: how many steps in a row a token may be left out of calls that are made; 0 computes all.

    Reference: Jiang et al. 2025, "SADA: Stability-guided Adaptive Diffusion Acceleration", section 3.2 (step-wise),
        and its cache-assisted pruning of tokens (token-wise).
    Cost: between one evaluation and none a step; ``nfe`` of a row is what it took, the plan's is an upper bound. With
        max_token_skips these are of less work: ``cost/work``, by multiply-adds.
    Identities: with max_skips=0 and max_token_skips=0 the solver without it.
    """

    start: float = 0.2
    stop: float = 0.94
    max_skips: int = 4
    max_token_skips: int = 0

    saves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(f"sada needs 0 <= start <= stop <= 1, got {self.start} and {self.stop}.")
        for name in ("max_skips", "max_token_skips"):
            if getattr(self, name) < 0:
                raise ValueError(f"sada.{name} must not be negative, got {getattr(self, name)}.")

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
        if self.max_token_skips:
            self._check_tokens(recipe, names)

    def _check_tokens(self, recipe: Any, guided: set[str]) -> None:
        model = recipe.model["name"]
        network = type(getattr(recipe.parts.model, "skeleton", None)).__name__
        others = guided - {"none", "chain", "cfg", "rescaled_cfg"}
        limited = getattr(recipe.parts.guidance, "limited", False)
        obstacles = (
            (network != "DiTTransformer2DModel", f"model {model} is no DiTTransformer2DModel, such as digits_dit"),
            (bool(others), f"guidance {', '.join(sorted(others))} asks the network in other ways than cfg"),
            (limited, "the interval of guidance leaves out evaluations that later ones look back at"),
            (bool(recipe.masks), "the schedule leaves out blocks of the network"),
        )
        for stands, why in obstacles:
            if stands:
                raise ValueError(
                    f"hook sada with max_token_skips={self.max_token_skips} leaves out tokens of a transformer, but "
                    f"{why}. Set max_token_skips=0 for its step-wise half alone."
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
        rule = self._rule(plan, i, y, memory)
        skip = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if rule is not None:
            skip = (rule.flatten(1).mean(dim=1) <= 0) & (memory["skipped"] < self.max_skips)
        x0 = x - plan.sigma[i] * memory["f"][0] if memory["f"] else x
        x0 = x0 / plan.alpha[i]
        asked, nfe = (~skip).nonzero()[:, 0], memory["nfe"]
        kept: dict[str, Any] = {}
        if self.max_token_skips and not getattr(model.model, "is_rehearsal", False):
            x0, nfe, kept = self._some_tokens(model, x, t, x0, asked, rule, memory)
        elif len(asked):
            x0, nfe = _ask(model, x, t, x0, asked, nfe)
        f = (y - x0) / u
        skipped = torch.where(skip, memory["skipped"] + 1, torch.zeros_like(memory["skipped"]))
        return x0, {"f": (f, *memory["f"][:2]), "y": y, "skipped": skipped, "nfe": nfe} | kept

    def _rule(self, plan: Any, i: int, y: Tensor, memory: Any) -> Tensor | None:
        """What must not be positive in the mean over what is stable at step i, (B, *shape); None where nothing is."""
        steps = len(plan.steps)
        if len(memory["f"]) < 3 or not self.start * steps <= i < self.stop * steps:
            return None
        a, b, c = memory["f"]
        change = plan.sigma[i] / plan.alpha[i] - plan.sigma[i - 1] / plan.alpha[i - 1]
        ahead = memory["y"] + change * (5 * a + 6 * b - 3 * c) / 8
        return (y - ahead) * (a - 2 * b + c)

    def _some_tokens(
        self, model: Any, x: Tensor, t: Any, x0: Tensor, asked: Tensor, rule: Tensor | None, memory: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """The network's predictions for the rows that are asked, each of the tokens that are not stable.

        Returns:
            the predictions of all rows, the evaluations of each so far, and what is remembered of tokens.
        """
        inner = copy.copy(model.model.inner)
        network, nfe, caches = inner.network, memory["nfe"], memory.get("tokens", {})
        values = dit.patches(network, x if rule is None else rule).mean(dim=2)
        ages = memory.get("ages", torch.zeros(values.shape, dtype=torch.int64, device=x.device))
        needed = (values > 0) | (ages >= self.max_token_skips)
        if rule is None:
            needed = torch.ones_like(needed)
        count, order = pruned.sized(values.masked_fill(needed, torch.inf))
        ages = ages + 1
        for size in count[asked].unique().tolist():
            rows = asked[count[asked] == size]
            active = None if size == order.shape[1] else order[rows, :size]
            inner.network = pruned.Pruned(network, caches, len(x), rows, active)
            with model.answering(inner.denoise, pruned.share(inner.skeleton, size)):
                x0, nfe = _ask(model, x, t, x0, rows, nfe)
            caches = inner.network.memory
            ages = ages.index_copy(0, rows, ages[rows].scatter(1, order[rows, :size], 0))
        return x0, nfe, {"tokens": caches, "ages": ages}

    def spent(self, memory: Any) -> Tensor:
        """Evaluations of every row so far, (B,) int64."""
        return memory["nfe"]


def _ask(model: Any, x: Tensor, t: Any, x0: Tensor, rows: Tensor, nfe: Tensor) -> tuple[Tensor, Tensor]:
    """Clean predictions with those of some rows put in their places, and the evaluations that each row took so far."""
    before = model.evaluations
    answer = model.some(rows).denoise(x[rows], t[rows] if isinstance(t, Tensor) and t.ndim else t)
    spent = torch.full_like(rows, (model.evaluations - before) // len(rows))
    return x0.index_copy(0, rows, answer), nfe.index_add(0, rows, spent)
