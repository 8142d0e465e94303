"""Log-likelihood of the row's own measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tasks import reference_items
from tasks.measurements import Measured, Operator, operator
from tasks.registry import models, rewards
from tasks.types import sample_shape


@rewards.register("measurement")
@dataclass(frozen=True)
class Measurement:
    """Log-likelihood of a noisy linear measurement that was made of the row's own reference image.

    ``r(x) = log N(y; A x, sigma_y^2 I)`` with ``y = A x_ref + sigma_y e``. Row i measures item i of the model's
    reference data (over again after the last) with noise keyed by (seed, i). So the problem of a row is a function of
    its index, and the same for every solver, strategy and seed of the study.

    Args:
        operator: A: inpaint, blur, pool, subsample, all (nothing is lost but to noise), or matrix.
        block: what inpaint loses: lower (half) or centre.
        width: standard deviation of the blur in pixels.
        factor: neighbours that pool averages, or the stride of subsample.
        matrix: rows of A over all elements of a state, for matrix.
        sigma_y: standard deviation of the measurement's noise.
        model: spec of the model whose reference data is measured.
        item: measure this item in every row, once; null takes item i in row i.
        y: a measurement of your own, the same for all rows, instead of a simulated one.
        seed: seed of the noise.

    Reference: Chung et al. 2023, "Diffusion Posterior Sampling for General Noisy Inverse Problems" (problems).
    Cost: two products with A.
    Identities: ``<A x, y> = <x, A^T y>``.
    """

    operator: str = "inpaint"
    block: str = "lower"
    width: float = 1.0
    factor: int = 2
    matrix: tuple[tuple[float, ...], ...] | None = None
    sigma_y: float = 0.1
    model: dict[str, Any] = field(default_factory=lambda: {"name": "digits"})
    item: int | None = None
    y: tuple[float, ...] | None = None
    seed: int = 0

    needs_labels = False
    differentiable = True

    def __post_init__(self) -> None:
        reference_items.check_measuring(self)
        self.check(sample_shape(models.build(self.model)))

    @property
    def revision(self) -> str:
        """Hash of what is measured."""
        return "1" if self.y is not None else reference_items.revision(self.model)

    def check(self, shape: tuple[int, ...]) -> None:
        """States of the shape that is measured."""
        known = reference_items.check_shape("measurement measures", self.model, shape)
        size = self._operator(known, "cpu").size
        if self.y is not None and len(self.y) != size:
            raise ValueError(f"reward.y must be the {size} numbers that {self.operator} measures, got {len(self.y)}.")

    @property
    def size(self) -> int:
        """Numbers that one row measures, M."""
        return self._operator(sample_shape(models.build(self.model)), "cpu").size

    def _operator(self, shape: tuple[int, ...], device: Any) -> Operator:
        return operator(
            self.operator,
            shape,
            block=self.block,
            width=self.width,
            factor=self.factor,
            matrix=self.matrix,
            device=device,
        )

    def at(self, indices: Tensor) -> Measured:
        """The scorer of the rows with these indices, (B,) int64."""
        found = self._operator(sample_shape(models.build(self.model)), indices.device)
        return Measured(found, reference_items.measured(self, indices, found.size, found), self.sigma_y)

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """Refused: the measurement is the row's own."""
        raise reference_items.without_rows("measurement scores row i against the measurement of row i", samples)
