"""A strategy's reward in a Ray actor of its own, with its own share of a device and its own environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from orchestrator import telemetry
from tasks import registry
from tasks.prompted import reading
from tasks.recipe import digest, scorer_identity
from tasks.registry import Spec, unknown
from tasks.remembered import Remembered

FIELDS = ("num_cpus", "num_gpus", "env", "metrics")
TRIES = 3

# Handles of this process: an actor ends when nobody holds one any more.
_HELD: dict[str, Any] = {}


def check(options: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing.

    Raises:
        ValueError: an unknown one, a share that is no number of at least 0, an environment that is no mapping, or
            ``metrics`` that is neither true nor false.
    """
    for key, value in options.items():
        if key not in FIELDS:
            raise unknown("field of executor.reward_actor:", key, list(FIELDS), "Fields")
        if key == "env":
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"executor.reward_actor.env must be a Ray runtime environment, {{pip: [...]}}, got {value!r}."
                )
        elif key == "metrics":
            if not isinstance(value, bool):
                raise ValueError(f"executor.reward_actor.metrics must be true or false, got {value!r}.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"executor.reward_actor.{key} must be a number of at least 0, got {value!r}.")


def _shared(array: Any) -> Tensor:
    """A tensor over the same memory."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


class RewardActor:
    """The process that scores: one for each reward, asked by all workers; it remembers values by content."""

    def __init__(self, spec: Spec, texts: tuple[str, ...] = ()) -> None:
        from tasks.run import use_one_thread

        use_one_thread()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        reward = registry.rewards.build(spec)
        self._cheap = bool(getattr(reward, "cheap", False))
        self._scorer = Remembered(reading(reward, texts))

    def score(self, samples: Any, cond: Any, indices: Any = None) -> tuple[Any, float, int]:
        """Numpy in: (B, *shape), labels (B,) or None, indices (B,) or None.

        Returns:
            the values (B,), seconds of scoring, and how many were known.
        """
        seconds, reused = self._scorer.seconds, self._scorer.reused
        with torch.no_grad():
            # What Ray hands over is shared and may not be written; scorers only read it.
            given, *rows = (None if a is None else _shared(a).to(self._device) for a in (samples, cond, indices))
            assert given is not None
            values = (self._scorer.always if self._cheap else self._scorer)(given, *rows).cpu().numpy()
        return values, self._scorer.seconds - seconds, self._scorer.reused - reused

    def counts(self) -> dict[str, float]:
        """Rows scored and reused, and seconds of scoring."""
        return {"scored": self._scorer.scored, "reused": self._scorer.reused, "seconds": self._scorer.seconds}


class ServedReward:
    """The reward as a worker's strategy sees it; every call goes to the actor.

    The first worker that asks makes the actor, under a name that the reward's identity determines. It ends with that
    worker; then the next call makes another.

    Args:
        spec: of the reward.
        texts: the model's prompts by label.
        options: the executor's ``reward_actor``.
    """

    def __init__(self, spec: Spec, texts: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self._spec, self._options = spec, dict(options)
        reward = registry.rewards.build(spec)
        self._texts = texts if hasattr(reward, "reading") else ()  # all models share the actor of any other
        self._by_row = hasattr(reward, "at")
        self._indices: Tensor | None = None
        self._spent = {"seconds": 0.0, "reused": 0}  # shared with the scorers of single rows
        self.name = f"solvus-reward-{digest([scorer_identity(spec), list(self._texts)])}"

    @property
    def seconds(self) -> float:
        """That the actor took to score for this object."""
        return self._spent["seconds"]

    @property
    def reused(self) -> int:
        """Rows whose values the actor knew."""
        return int(self._spent["reused"])

    @property
    def at(self) -> Callable[[Tensor], ServedReward]:
        """(B,) int64 sample indices -> the scorer of these rows, where the reward depends on the row."""
        if not self._by_row:
            raise AttributeError("at")
        return self._at

    def _at(self, indices: Tensor) -> ServedReward:
        made = copy(self)
        made._indices = indices
        return made

    def actor(self) -> Any:
        """Its handle."""
        import ray

        if self.name in _HELD:
            return _HELD[self.name]
        decorate: Any = ray.remote
        share = {"num_cpus": self._options.get("num_cpus", 1), "num_gpus": self._options.get("num_gpus", 0)}
        if self._options.get("env"):
            share["runtime_env"] = dict(self._options["env"])
        remote = decorate(RewardActor).options(name=self.name, get_if_exists=True, **share)
        return _HELD.setdefault(self.name, remote.remote(self._spec, self._texts))

    def __call__(self, samples: Tensor, cond: Tensor | None) -> Tensor:
        """(B,), on the samples' device."""
        import ray

        began = time.perf_counter()
        given = [None if tensor is None else tensor.cpu().numpy() for tensor in (samples, cond, self._indices)]
        for attempt in range(TRIES):
            try:
                values, seconds, reused = ray.get(self.actor().score.remote(*given))
                self._spent["seconds"] += seconds
                self._spent["reused"] += reused
                telemetry.record("solvus_reward_seconds", time.perf_counter() - began, scorer=self._spec["name"])
                telemetry.record("solvus_scored", len(values), scorer=self._spec["name"])
                return torch.from_numpy(values.copy()).to(samples.device)
            except ray.exceptions.RayActorError:  # it ended with the worker that made it
                _HELD.pop(self.name, None)
                if attempt + 1 == TRIES:
                    raise
        raise AssertionError("unreachable")
