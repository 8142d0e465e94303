"""A trial: one point of a study on a range of sample indices, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.ports import Proposal
from tasks.recipe import Recipe, digest


@dataclass
class Trial:
    """One point of a study: the recipe with overrides, on a range of sample indices, and what came of it."""

    number: int
    proposal: Proposal
    recipe: Recipe
    first_index: int
    num_samples: int
    state: str = "running"
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    quarantined: dict[int, str] = field(default_factory=dict)
    times: list[float] | None = None
    looks: list[Any] = field(default_factory=list)
    stopped: bool = False
    estimate: float | None = None
    open_shards: int = 0
    attempts: int = 0
    counted: int = 0
    had: int = 0  # samples that the store had when they were first asked for
    announced: bool = False
    damaged: bool = False
    lost: dict[int, str] = field(default_factory=dict)  # rows that are not finite, until it is known whether all are
    ahead: frozenset[str] = frozenset()  # keys of the companion rows that are being made for it
    rounds: int = 0  # how often they were, since it last got on

    @property
    def part(self) -> str:
        """The part of the study that it belongs to."""
        return self.proposal.part

    @property
    def stop(self) -> int:
        """One past its last sample index."""
        return self.first_index + self.num_samples

    @property
    def nfe(self) -> float:
        """Network evaluations of one sample: as planned, or what rows really cost where that is decided on the way."""
        return self.recipe.nfe if self.recipe.account.exact else self.values.get("cost/nfe", self.recipe.nfe)

    @property
    def seconds(self) -> float | None:
        """Device-seconds of one sample, by whoever made it; None where no rows are there."""
        return self.cost["generate_s"] / self.num_samples if self.cost.get("generate_s") else None

    @property
    def told(self) -> dict[str, float]:
        """What its search is told: values on all samples, estimated where a race stopped it, and what it rests on."""
        work = {"cost/work": self.values["cost/nfe"]} if "cost/nfe" in self.values else {}
        told = work | self.values | {"study/num_samples": float(self.num_samples)}
        if self.num_samples and self.cost.get("generate_s") is not None:
            told["study/device_s"] = self.cost["generate_s"] / self.num_samples
        return told if self.estimate is None else told | {self.proposal.race.objective: self.estimate}

    @property
    def identity(self) -> str:
        """The same for the same rows in the same part."""
        if self.num_samples == 0:  # it never ran: known by what was asked for
            return f"{self.part}/refused/{digest(dict(self.proposal.overrides))}"
        return f"{self.part}/{self.recipe.key}/{self.first_index}-{self.stop}"

    @property
    def title(self) -> str:
        """A line for people."""
        changed = ", ".join(f"{path}={_short(value)}" for path, value in self.proposal.overrides.items())
        return f"#{self.number} {self.part} {changed or 'as configured'}".replace("  ", " ")

    def described(self) -> dict[str, Any]:
        """Recipe and range as plain data."""
        r = self.recipe
        specs = {"model": r.model, "solver": r.solver, "times": r.times, "guidance": r.guidance, "strategy": r.strategy}
        if r.initial["name"] != "prior":
            specs["initial"] = r.initial
        plain = {"batch_size": r.batch_size, "seed": r.seed, "dtype": r.dtype, "device": r.device, "nfe": r.nfe}
        reward = {} if r.reward is None else {"reward": r.reward}
        plain |= {"work": r.work} if r.masks else {}
        return specs | reward | plain | {"num_samples": self.num_samples, "first_index": self.first_index}

    def fingerprint(self) -> str:
        """Changes when the result does."""
        return digest([self.state, self.values, self.errors])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = value.get("config") or {}
        return f"{value.get('scheduler', value.get('name'))}{json.dumps(inner) if inner else ''}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
