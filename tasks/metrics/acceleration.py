"""What savings changed."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.registry import Spec, features, metrics
from tasks.row_distance import RowDistance

NAME, COLUMN = "quality/acceleration_distance", "acceleration_distance"


@metrics.register("acceleration")
@dataclass(frozen=True)
class Acceleration(RowDistance):
    """Root mean square distance of the samples to those made without savings, row by row at equal seeds.

    ``sqrt(mean over rows i of d_i^2)`` with d_i the row's own distance (features ``acceleration_distance``). What was
    saved is in ``cost/nfe`` and ``cost/work``; ``cost/speedup`` of the trial table is the device-seconds of the rows
    without savings over those of the trial's own, as both were measured when they were made.

    Reference: none needed; published tables have LPIPS or PSNR against the unaccelerated images.
    Cost: one trajectory without savings a sample, once for all trials that differ in savings alone.
    """

    better = {NAME: "lower"}
    value, column = NAME, COLUMN

    def needs(self) -> tuple[Spec, ...]:
        """The distances."""
        return (features.complete({"name": COLUMN}),)
