"""A small joint distribution over tokens, with its posterior by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tasks.processes import Masked
from tasks.registry import models
from tasks.tokens import check_tokens


@models.register("table")
@dataclass(frozen=True)
class Table:
    """Explicit joint table over V^L token strings; the masked posterior is exact.

    ``p(x_0^l = v | x_t)`` is the share of probability, among the strings that agree with every unmasked token, of those
    with v at position l. The loaded model also gives the log-probability of whole strings, ``energy_log_prob``.

    Args:
        vocabulary: number of tokens V.
        length: string length L; V^L is at most 100,000.
        seed: seed of the random table (Dirichlet with the given concentration).
        concentration: smaller makes the table peakier and the tokens more dependent.
        probabilities: the V^L probabilities themselves, last token fastest.

    Reference: closed form (Bayes' rule).
    """

    vocabulary: int = 3
    length: int = 4
    seed: int = 0
    concentration: float = 0.3
    probabilities: tuple[float, ...] | None = None

    kind = "tokens"
    num_classes = 0
    revision = "exact"
    gives = ("posterior_mean", "energy_log_prob")
    ignores_time = True

    def __post_init__(self) -> None:
        if self.vocabulary < 2 or self.length < 1 or self.vocabulary**self.length > 100_000:
            raise ValueError(
                f"table needs vocabulary >= 2, length >= 1 and vocabulary^length <= 100000, got {self.vocabulary} and "
                f"{self.length}."
            )
        if self.probabilities is not None and (
            len(self.probabilities) != self.vocabulary**self.length
            or min(self.probabilities) < 0
            or not sum(self.probabilities) > 0
        ):
            raise ValueError(f"model.probabilities must be {self.vocabulary**self.length} numbers >= 0, not all 0.")

    @cached_property
    def joint(self) -> np.ndarray:
        """Probability of each string, (V^L,) float64."""
        if self.probabilities is not None:
            given = np.asarray(self.probabilities, dtype=np.float64)
            return given / given.sum()
        rng = np.random.default_rng(self.seed)
        return rng.dirichlet(np.full(self.vocabulary**self.length, self.concentration))

    @cached_property
    def strings(self) -> np.ndarray:
        """All strings, (V^L, L) int64, in the order of ``joint``."""
        return np.array(list(itertools.product(range(self.vocabulary), repeat=self.length)), dtype=np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """(L,)."""
        return (self.length,)

    @property
    def log_prob_revision(self) -> str:
        """The joint is in the settings."""
        return self.revision

    @property
    def noising(self) -> Masked:
        """The process object."""
        return Masked(self.vocabulary)

    def reference(self, count: int = 10000) -> tuple[np.ndarray, np.ndarray]:
        """Exact draws with a fixed seed: strings (count, L) and zeros for labels."""
        pick = np.random.default_rng(20230).choice(len(self.joint), size=count, p=self.joint)
        return self.strings[pick], np.zeros(count, dtype=np.int64)

    def load(self, device: str) -> TableDenoiser:
        """The denoiser on a device."""
        return TableDenoiser(self, torch.device(device))


class TableDenoiser:
    """The exact masked posterior."""

    def __init__(self, spec: Table, device: torch.device) -> None:
        self.process, self.shape, self.num_classes = spec.noising, spec.shape, 0
        self._strings = torch.from_numpy(spec.strings).to(device)
        self._joint = torch.from_numpy(spec.joint).to(device)
        self._one_hot = torch.nn.functional.one_hot(self._strings, spec.vocabulary).double()  # (S, L, V)

    def denoise(self, x: Tensor, t: float, cond: Tensor | None = None) -> Tensor:
        """Class probabilities of every token, (B, L) -> (B, L, V) float64."""
        agree = (x[:, None, :] == self._strings) | (x[:, None, :] == self.process.mask)
        weight = agree.all(-1).double() * self._joint  # (B, S)
        weight = weight / weight.sum(-1, keepdim=True)
        return torch.einsum("bs,slv->blv", weight, self._one_hot)

    def energy_log_prob(self, tokens: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p(x) of whole strings in nats, the joint itself; (B, L) int64 -> (B,) float64, -inf where it is 0."""
        check_tokens(tokens, self.process.vocabulary, self.shape[0])
        base = self.process.vocabulary ** torch.arange(self.shape[0] - 1, -1, -1, device=tokens.device)
        return self._joint[(tokens * base).sum(dim=1)].log()

    def decode(self, x0: Tensor, cond: Tensor | None = None) -> Tensor:
        """The tokens themselves."""
        return x0
