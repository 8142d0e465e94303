"""Log-likelihood of a sample under a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tasks import likelihood, registry
from tasks.noise import RowNoise
from tasks.recipe import canonical, digest
from tasks.registry import rewards
from tasks.types import Model


@lru_cache(maxsize=4)
def _load(spec: str, device: str) -> Model:
    return registry.models.build(json.loads(spec)).load(device)


@rewards.register("log_likelihood")
@dataclass(frozen=True)
class LogLikelihood:
    """log p(x) of a sample in nats under a Gaussian model, by the change of variables along its ODE.

    The probes of Hutchinson's estimator are keyed by the bytes of the sample, so that a score is a function of the
    sample alone, as a stored column must be, and the errors of different samples are independent.

    Args:
        model: spec of the model whose density is asked, ``{name: digits}``.
        steps: number of integration steps, even.
        probes: random directions for the trace, unbiased for any number; 0 takes the exact trace.
        conditional: take the density given the row's label; otherwise that of the unconditional model.
        seed: seed of the probes.

    Reference: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", section
        4.3 and appendix D.2.
    Cost: ``4 steps + 2 (steps + 1) probes`` evaluations of the model for every sample.
    """

    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits"})
    steps: int = 20
    probes: int = 1
    conditional: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        spec = registry.models.build(self.model)
        likelihood.check(spec.noising, self.steps, self.probes)
        if self.conditional and not spec.num_classes:
            raise ValueError(
                f"reward.conditional needs a model with labels, but {self.model['name']} has none. Set "
                "reward.conditional=false."
            )

    @property
    def needs_labels(self) -> bool:
        """Only when the density is conditional."""
        return self.conditional

    @property
    def revision(self) -> str:
        """Hash of the model's weights and of how the number is computed."""
        return digest(["1", likelihood.DISPLACEMENT, registry.models.build(self.model).revision])[:16]

    def check(self, shape: tuple[int, ...]) -> None:
        """Samples of the shape that the model knows."""
        known = tuple(registry.models.build(self.model).shape)
        if tuple(shape) != known:
            raise ValueError(
                f"log_likelihood asks model {self.model['name']}, which knows samples of shape {known}, but these have "
                f"shape {tuple(shape)}. Set reward.model to the model of the study."
            )

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) float64."""
        model = _load(canonical(self.model), str(samples.device))
        if not self.conditional:
            cond = torch.full((len(samples),), model.num_classes, device=samples.device) if model.num_classes else None
        noise = RowNoise(self.seed, _own_indices(samples))
        return likelihood.log_likelihood(model, samples, cond, noise, self.steps, self.probes)


def _own_indices(samples: Tensor) -> Tensor:
    """32 bits of a hash of every sample, (B,) int64: the key of its probes."""
    rows = samples.detach().cpu().contiguous().numpy()
    keys = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:4], "little") for row in rows]
    return torch.tensor(keys, dtype=torch.int64, device=samples.device)
