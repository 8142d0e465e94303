"""The best sample of a class that enough samples agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks import classifier
from tasks.account import Account
from tasks.lookahead import rows_of
from tasks.registry import strategies, unknown
from tasks.types import Noise, Reward, Samples, reindex, sample_shape

EQUIVALENCES = ("classifier", "cell", "tokens")


@strategies.register("best_of_majority")
@dataclass(frozen=True)
class BestOfMajority:
    """Best of N among the answers that are frequent: a guard against samples that only please the reward.

    Samples fall into classes of equivalent answers. Those of a class with less than ``threshold`` of the samples are
    dropped (if every class is that rare, the most frequent ones stay), and the largest reward of the rest wins.

    Args:
        n: number of candidates N.
        threshold: smallest frequency of a class that is kept; in theory 3 / (4 C) for a coverage coefficient C.
        equivalence: when two samples are the same answer: ``classifier`` (the embedded classifier sees the same digit),
            ``cell`` (every coordinate lies in the same cell), ``tokens`` (equal strings). Must be chosen.
        cell: edge of a cell.
        budget: caps per sample: nfe, reward_calls, decodes, seconds.

    Reference: Di et al. 2025, "Best-of-Majority: Minimax-Optimal Strategy for Pass@k Inference Scaling", algorithm 1.
    Cost: N times the solver's evaluations and N reward calls.
    Identities: with n=1 this is ``single``; with threshold=0 it is ``best_of_n``.
    """

    n: int = 16
    threshold: float = 0.1
    equivalence: str | None = None
    cell: float = 1.0
    budget: dict[str, float] = field(default_factory=dict)

    branches = False
    intermediate = False
    semantics = "best"

    def __post_init__(self) -> None:
        if self.n < 1 or self.cell <= 0 or not 0 <= self.threshold <= 1:
            raise ValueError(
                "best_of_majority needs n >= 1, cell > 0 and a threshold between 0 and 1, got "
                f"{self.n}, {self.cell} and {self.threshold}."
            )
        if self.equivalence is not None and self.equivalence not in EQUIVALENCES:
            raise unknown("equivalence", self.equivalence, list(EQUIVALENCES), "Allowed")

    @property
    def particles(self) -> int:
        """N."""
        return self.n

    @property
    def uses_reward(self) -> bool:
        """A single candidate needs no choice."""
        return self.n > 1

    def check_recipe(self, recipe: Any) -> None:
        """Without a notion of equal answers there is no majority.

        Raises:
            ValueError: says which notions fit.
        """
        tokens = recipe.parts.model.noising.kind == "masked"
        if self.equivalence is None or (self.equivalence == "tokens") != tokens:
            raise ValueError(
                f"strategy best_of_majority counts equal answers, but strategy.equivalence={self.equivalence} is none "
                f"for model {recipe.model['name']}. Set it to "
                + ("tokens." if tokens else "classifier (8x8 digits) or cell (coordinates in cells of strategy.cell).")
            )
        if self.equivalence == "classifier":
            classifier.refuse_other_shapes(sample_shape(recipe.parts.model), "strategy.equivalence=classifier")

    def account(self, evaluations: Sequence[int]) -> Account:
        """N trajectories and reward calls."""
        calls = self.n if self.n > 1 else 0
        return Account(self.n * sum(evaluations), calls, calls)

    def _same(self, answers: Tensor) -> Tensor:
        """Which samples of a row are the same answer: (B N, *shape) -> (B, N, N) bool."""
        if self.equivalence == "classifier":
            names = classifier.classify(answers).argmax(-1)[:, None]
        elif self.equivalence == "cell":
            names = torch.floor(answers.double() / self.cell).flatten(1)
        else:
            names = answers.flatten(1)
        names = names.view(-1, self.n, names.shape[1])
        return (names[:, :, None] == names[:, None, :]).all(-1)

    def __call__(self, sampler: Any, reward: Reward | None, noise: Noise) -> Samples:
        """Columns ``candidate_rewards``, ``candidate_frequencies`` (B, N), ``slot`` and ``frequency`` (B,)."""
        if self.n == 1:
            return Samples(sampler.run(noise).x)
        assert reward is not None
        wide = sampler.repeat(self.n)
        x0 = wide.run(noise.repeat(self.n)).x
        answers = sampler.model.decode(x0, wide.cond)
        rewards = reward(answers, wide.cond).view(-1, self.n)
        frequency = self._same(answers).double().mean(-1)
        needed = torch.minimum(torch.full_like(frequency, self.threshold), frequency.max(dim=1, keepdim=True).values)
        slot = rewards.masked_fill(frequency < needed - 1e-9, -torch.inf).argmax(dim=1)
        columns = {
            "candidate_rewards": rewards,
            "candidate_frequencies": frequency,
            "slot": slot,
            "frequency": frequency.gather(1, slot[:, None])[:, 0],
        }
        return Samples(reindex(x0, rows_of(slot[:, None], self.n)), columns)
