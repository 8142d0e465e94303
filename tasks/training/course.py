"""What all training runs share: the rate's rise and fall, averaged weights, the loss that is told, and the record."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step, counted from 1: a linear rise, then half a cosine down to a thousandth."""
    warmup = min(warmup, max(1, steps // 10))
    fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    return max(min(step / warmup, fall), 1e-3)


@torch.no_grad()
def average_in(averaged: Mapping[str, Tensor], network: torch.nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the weights, in place; a shorter memory in the first steps."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for key, value in network.state_dict().items():
        averaged[key].lerp_(value, weight)


class Course:
    """The losses of a run as it goes, and its ``training.json`` at the end.

    Args:
        name: of the model.
        steps: of the optimiser.
        points: how often the mean loss since the last time is told and kept.
        report: told of the progress.
        terms: names of the losses.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        points: int,
        report: Callable[[str], None],
        terms: tuple[str, ...] = ("loss",),
    ) -> None:
        self._name, self._steps, self._every, self._report = name, steps, max(1, steps // points), report
        self._terms, self._sums, self._since = terms, [0.0] * len(terms), 0
        self._curve: list[tuple[float, ...]] = []
        self._started = time.perf_counter()

    def after(self, step: int, *losses: Tensor) -> None:
        """Take the losses of a step, counted from 1."""
        self._sums = [total + loss.item() for total, loss in zip(self._sums, losses, strict=True)]
        self._since += 1
        if step % self._every and step != self._steps:
            return
        means = [total / self._since for total in self._sums]
        self._curve.append((step, *(round(mean, 5) for mean in means)))
        told = ", ".join(f"{term} {mean:.4f}" for term, mean in zip(self._terms, means, strict=True))
        elapsed = time.perf_counter() - self._started
        self._report(f"{self._name} step {step}/{self._steps} {told} {elapsed:.0f} s")
        self._sums, self._since = [0.0] * len(self._terms), 0

    def record(self, folder: Path, *, batch_size: int, seed: int, **more: Any) -> dict[str, Any]:
        """Write ``training.json``: the command, the settings, what else is known, and the loss curve; returns it."""
        sizes = f"--steps {self._steps} --batch-size {batch_size} --seed {seed}"
        found = {
            "command": f"solvus train {self._name} {sizes}",
            "model": self._name,
            "seed": seed,
            "steps": self._steps,
            "batch_size": batch_size,
            **more,
            "seconds": round(time.perf_counter() - self._started, 1),
            "torch": torch.__version__,
            "loss_curve": self._curve,
        }
        (folder / "training.json").write_text(json.dumps(found, indent=1) + "\n")
        return found
