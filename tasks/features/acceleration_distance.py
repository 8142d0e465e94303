"""How far a sample is from the one that was made without savings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tasks.registry import features


@features.register("acceleration_distance")
@dataclass(frozen=True)
class AccelerationDistance:
    """Root mean square distance of a sample to the same row without its savings.

    ``d_i = sqrt(mean over elements of (x_i - y_i)^2)``, where y_i is row i of the companion recipe: equal in seed,
    noise, solver, times and guidance, but without the hooks and guidance that spare evaluations or parts of them (sada,
    step_cache, ras, deediff, int8). Both are compared as they are stored: exactly up to 4096 numbers a sample, larger
    images to 8 bits.

    Reference: none needed; published tables have LPIPS or PSNR against the unaccelerated images.
    Cost: one trajectory without savings a sample, once for all trials that differ in savings alone.
    Identities: 0 where nothing is saved.
    """

    needs_labels = False
    revision = "1"
    compares_seconds = True  # with those of the companion

    def check(self, shape: tuple[int, ...]) -> None:
        """Any shape."""

    def dim(self, shape: tuple[int, ...]) -> int:
        """1."""
        return 1

    def companion(self, recipe: Any) -> Any:
        """The recipe without its savings.

        Raises:
            ValueError: the recipe saves nothing.
        """
        changes: dict[str, Any] = {}
        guided = recipe.parts.guidance
        if getattr(guided, "saves", False):
            parts = getattr(guided, "plugins", ())
            kept = [spec for spec, part in zip(getattr(guided, "specs", ()), parts, strict=True) if not _saves(part)]
            changes["guidance"] = kept[0] if len(kept) == 1 else kept or "none"
        hooks = getattr(recipe.parts.solver, "hook_objects", ())
        if any(map(_saves, hooks)):
            changes["solver.hooks"] = [
                spec for spec, hook in zip(recipe.solver["hooks"], hooks, strict=True) if not _saves(hook)
            ]
        if not changes:
            raise ValueError(
                "metric acceleration compares rows with those made without savings, but this recipe has none. Add one, "
                "such as guidance=step_cache or a hook sada, or leave the metric out."
            )
        return recipe.override(changes | {"reward": None})

    def __call__(self, samples: Tensor, cond: Tensor | None, companion: Tensor) -> Tensor:
        """(B, 1) float64, in the units of the samples."""
        return (samples.double() - companion.double()).flatten(1).square().mean(dim=1, keepdim=True).sqrt()


def _saves(plugin: Any) -> bool:
    return getattr(plugin, "saves", False)
