"""Step caching: diffusers' own cache hooks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tasks.registry import guidance, unknown
from tasks.savings import Meter, branch_of, check_steps, twin
from tasks.types import Model

KINDS = {  # our name -> the configuration, and the function that puts its hooks in place
    "first_block": ("FirstBlockCacheConfig", "apply_first_block_cache"),
    "mag": ("MagCacheConfig", "apply_mag_cache"),
    "pyramid": ("PyramidAttentionBroadcastConfig", "apply_pyramid_attention_broadcast"),
    "taylorseer": ("TaylorSeerCacheConfig", "apply_taylorseer_cache"),
}


@guidance.register("step_cache")
@dataclass(frozen=True)
class StepCache:
    """Step caching on a transformer: diffusers' hooks answer parts of an evaluation from those of earlier steps.

    The hooks sit on a copy of the modules around the same weights, one for the evaluations with labels and one for
    those without, and are new for every batch. ``first_block`` and ``mag`` decide for a whole batch at once, so a row
    depends on the rows of its block of indices; blocks, and with them the rows, are the same for any shards.

    Args:
        kind: first_block (skips the other blocks while the first one's residual hardly changes), taylorseer (predicts
            the outputs of attention and feed-forward layers), pyramid (repeats attention outputs), or mag (skips by
            magnitude ratios, which ``config`` must give).
        config: fields of the diffusers configuration, for example ``{threshold: 0.1}`` or ``{cache_interval: 3}``.

    Reference: diffusers (hooks); Liu et al. 2025, "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers"; Zhao et al. 2024, "Real-Time Video Generation with Pyramid Attention Broadcast".
    Cost: as many evaluations, of less work: ``cost/work`` says how much less.
    Identities: first_block with threshold=0 is the model itself, as long as no residual stands still.
    """

    kind: str = "first_block"
    config: dict[str, Any] = field(default_factory=dict)

    evaluations = 1
    needs_labels = False
    edits_network = touches_layers = True
    remembers = True
    saves = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("guidance.kind", self.kind, list(KINDS), "Allowed")

    def check_recipe(self, recipe: Any) -> None:
        """Refuse networks and configurations that the hooks do not fit.

        Raises:
            ValueError: no transformer, unknown fields, or a solver that asks at other times than once a step.
        """
        network = getattr(recipe.parts.model, "skeleton", None)
        if network is None or not hasattr(network, "transformer_blocks"):
            raise ValueError(
                f"guidance step_cache hooks into the blocks of a transformer, but model {recipe.model['name']} is none."
                " Use a model that is one, such as digits_dit; for UNets, a hook sada."
            )
        blocks = sum(len(getattr(network, kind, ())) for kind in ("transformer_blocks", "single_transformer_blocks"))
        if self.kind in ("first_block", "mag") and blocks < 2:
            raise ValueError(
                f"guidance.kind={self.kind} skips the blocks after the first, but model {recipe.model['name']} has "
                f"{blocks} in all. Use taylorseer or pyramid."
            )
        check_steps(recipe, "step_cache")
        self._settings()

    def _settings(self) -> Any:
        import diffusers

        kind: Any = getattr(diffusers, KINDS[self.kind][0])
        known = list(kind.__dataclass_fields__)
        for name in self.config:
            if name not in known:
                raise unknown(f"field of {kind.__name__}", name, known, "Fields")
        extra: dict[str, Any] = {}
        if self.kind == "taylorseer":
            import torch

            # Half precision by default, whatever the model's; and the default patterns miss layers named attn1.
            extra["taylor_factors_dtype"] = torch.float32
            extra["cache_identifiers"] = [r".*blocks\.\d+\.(attn|ff)\w*"]
        if self.kind == "pyramid":
            extra = {"spatial_attention_block_skip_range": 2}
        try:
            return kind(**extra | self.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"guidance.config does not make a {kind.__name__}: {error}") from None

    def hooked(self, network: Any, time: Any) -> Any:
        """A copy of a network with the hooks in place.

        Args:
            network: with weights.
            time: gives the training step of the current evaluation.
        """
        from diffusers import hooks

        settings, found = self._settings(), twin(network)
        if self.kind == "pyramid":
            settings.current_timestep_callback = time
        getattr(hooks, KINDS[self.kind][1])(found, settings)
        if not any(hasattr(module, "_diffusers_hook") for module in found.modules()):
            raise ValueError(
                f"step_cache of kind {self.kind} found no layer of this network to hook into. Name some in "
                "guidance.config, or use another kind."
            )
        return found

    def wrap(self, model: Model) -> Model:
        """The model that remembers."""
        return _Cached(model, self)


class _Cached:
    def __init__(self, model: Model, spec: StepCache) -> None:
        self._model, self._spec = model, spec
        self._twins: dict[str, tuple[Any, Meter]] = {}
        self._latest: dict[str, float] = {}
        self._time = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The clean prediction, parts of it remembered."""
        if getattr(self._model, "is_rehearsal", False):
            return self._model.denoise(x, t, cond)
        branch, now = branch_of(self._model, cond), float(t if not isinstance(t, Tensor) else t.max())
        if now >= self._latest.get(branch, 0.0):  # a new trajectory
            self._twins[branch] = self._twin()
        self._latest[branch], self._time = now, int(self.process.model_time(now))
        from diffusers.models.cache_utils import CacheMixin

        model, meter = self._twins[branch]
        with CacheMixin.cache_context(model.network, branch):  # not all transformers inherit it
            return self._model.other(model.denoise, x, t, cond, meter.share)  # type: ignore[attr-defined]

    def _twin(self) -> tuple[Any, Meter]:
        model = copy.copy(self._model.inner)  # type: ignore[attr-defined]
        model.network = self._spec.hooked(model.network, lambda: self._time)
        return model, Meter(model.network)
