"""Post-training quantisation to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tasks.branches import edited
from tasks.int8 import Recorder, integer, layers_of, on_integers
from tasks.kernels import ddim
from tasks.registry import guidance
from tasks.types import Model

STEPS = 50  # of the trajectories that calibration inputs are taken from


@guidance.register("int8")
@dataclass(frozen=True)
class Int8:
    """Post-training int8 quantisation: linear layers and convolutions run on integers, with ranges that know the time.

    Calibration inputs are states of the backward process, DDIM trajectories of the network itself, at times drawn from
    ``N(mean, std^2)`` cut to (0, 1): noisy data alone would give other ranges. The range of each layer's inputs and
    outputs is the one of least mean squared error. With several groups, times are cut into equal parts with ranges of
    their own. Weights are rounded to the nearest, by output channel, without AdaRound.

    Args:
        groups: parts of time with ranges of their own; 1 is PTQ4DM.
        mean: centre of the calibration times; below 0.5, nearer to the data.
        std: their spread.
        num_samples: calibration inputs.
        artifact: file with ranges found before.

    Reference: Shang et al. 2023, "Post-training Quantization on Diffusion Models" (PTQ4DM), algorithm 1; He et al.
        2023, "PTQD"; So et al. 2023, "Temporal Dynamic Quantization for Diffusion Models" (ranges that depend on time).
    Cost: as many evaluations; on small layers the conversions outweigh the integers, so measure ``seconds``. Runs on
        the CPU alone. The calibration makes ``50 num_samples`` evaluations, once.
    """

    groups: int = 1
    mean: float = 0.4
    std: float = 0.4
    num_samples: int = 128
    artifact: str = ""

    evaluations = 1
    needs_labels = False
    edits_network = touches_layers = True
    saves = True
    calibrated_on: ClassVar[tuple[str, ...]] = ("labels",)
    calibration_revision: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.num_samples < 1 or self.std <= 0:
            raise ValueError(
                f"int8 needs groups >= 1, num_samples >= 1 and std > 0, got {self.groups}, {self.num_samples} and "
                f"{self.std}."
            )

    def check_recipe(self, recipe: Any) -> None:
        """Refuse what has no layers to quantise, and devices without such kernels.

        Raises:
            ValueError: no network, or another device than the CPU.
        """
        if getattr(recipe.parts.model, "skeleton", None) is None or recipe.parts.model.noising.kind != "gaussian":
            raise ValueError(
                f"guidance int8 quantises the layers of a network, but model {recipe.model['name']} is none. Use a "
                "model that is one, such as digits."
            )
        if recipe.device != "cpu":
            raise ValueError(f"guidance int8 uses torch's integer kernels of the CPU, got device={recipe.device}.")

    def calibration_fields(self) -> dict[str, Any]:
        """What the artifact depends on."""
        return {name: getattr(self, name) for name in ("groups", "mean", "std", "num_samples")}

    def calibrate(self, bench: Any) -> dict[str, np.ndarray]:
        """Ranges of every layer in every part of time, (groups, layers, 2)."""
        model, rows = bench.counted, self.num_samples
        x = model.process.prior(model.shape, bench.noise(rows), 1.0)
        cond = bench.labels(rows)
        chosen = self._times(rows)
        seen: list[tuple[float, Tensor, Tensor | None]] = []
        for k in range(STEPS):
            t, s = 1 - k / STEPS, 1 - (k + 1) / STEPS
            here = torch.from_numpy(chosen == k)
            if here.any():
                seen.append((t, x[here], None if cond is None else cond[here]))
            x = ddim(model.process, x, model.denoise(x, t, cond), t, s, 0.0)[0]
        recorder, found = Recorder(model.network), []
        for group in range(self.groups):
            mine = [
                state for state in seen if self.group(state[0]) == group
            ] or seen  # a part that nothing was drawn in
            with recorder.listening():
                for t, state, labels in mine:
                    model.denoise(state, t, labels)
            found.append(recorder.ranges())
        return {"ranges": np.stack(found)}

    def _times(self, rows: int) -> np.ndarray:
        """The step at which each row's state is taken, (rows,) int."""
        draws = np.random.default_rng(0).normal(self.mean, self.std, size=100 * rows)
        inside = draws[(draws > 0) & (draws <= 1)]
        return np.minimum(((1 - np.resize(inside, rows)) * STEPS).astype(int), STEPS - 1)

    def group(self, t: float) -> int:
        """The part of time that t lies in."""
        return min(int(t * self.groups), self.groups - 1)

    def wrap(self, model: Model) -> Model:
        """The quantised model; before its calibration the model itself."""
        return _Quantised(model, self) if hasattr(self, "calibrated") else model


class _Quantised:
    def __init__(self, model: Model, spec: Int8) -> None:
        self._model, self._spec = model, spec
        self._forwards: dict[int, list[Any]] = {}  # of every part of time that was asked for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: float | Tensor, cond: Tensor | None) -> Tensor:
        """The quantised network's clean prediction."""
        now = float(t.max()) if isinstance(t, Tensor) else float(t)
        with edited(self._model, lambda network: self._integers(network, self._spec.group(now))):
            return self._model.denoise(x, t, cond)

    def _integers(self, network: Any, group: int) -> Any:
        if group not in self._forwards:
            ranges = self._spec.calibrated["ranges"][group]  # type: ignore[attr-defined]
            pairs = zip(layers_of(network).values(), ranges, strict=True)
            self._forwards[group] = [integer(layer, float(scale), int(zero)) for layer, (scale, zero) in pairs]
        return on_integers(network, self._forwards[group])
