"""How much device time a study still needs, from what finished trials really cost.

A plan counts every trial with all its samples. A race stops most of them early, and what the store has costs nothing,
so that count is far too high. Here a part's finished trials say by how much:

    left = (planned evaluations of its other trials) * (evaluations made / planned, over finished ones) * (seconds each)

and a running trial is expected to cost what finished ones did. A part without a finished trial counts as planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class _Part:
    """One part: what was foreseen, and what its trials that ended or run have cost."""

    trials: int = 0  # foreseen
    working: int = 0  # of these, how many lack rows
    nfe: float = 0.0  # evaluations of the missing rows, with all samples of every trial
    idle: int = 0  # ended without making a row
    planned: float = 0.0  # evaluations that ended trials would have taken with all samples
    made: float = 0.0  # evaluations that they took
    spent_nfe: float = 0.0  # the same two sums over everything, running trials too
    spent_s: float = 0.0


@dataclass
class _Running:
    part: str
    planned: float
    made: float = 0.0


@dataclass
class Forecast:
    """Device-seconds that are left, as work ends.

    Args:
        foreseen: for every part its ``trials``, how many of them are ``working`` (lack rows), and the ``nfe`` of those.
    """

    foreseen: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parts = {
            name: _Part(int(part["trials"]), int(part["working"]), float(part["nfe"]))
            for name, part in self.foreseen.items()
        }
        self._running: dict[int, _Running] = {}

    def began(self, number: int, part: str, planned_nfe: float) -> None:
        """A trial is planned, with so many evaluations if it goes all the way; a later call replaces the number."""
        running = self._running.setdefault(number, _Running(part, 0.0))
        running.planned = planned_nfe

    def spent(self, part: str, nfe: float, device_s: float, number: int | None = None) -> None:
        """A shard was made; ``number`` is None where it counts as no trial's own, such as companion rows."""
        held = self._parts.setdefault(part, _Part())
        held.spent_nfe += nfe
        held.spent_s += device_s
        if number in self._running:
            self._running[number].made += nfe
        else:
            held.planned += nfe

    def ended(self, number: int, part: str) -> None:
        """A trial has its values, or failed."""
        held, trial = self._parts.setdefault(part, _Part()), self._running.pop(number, None)
        if trial is None or not trial.made:
            held.idle += 1
        else:
            held.planned += max(trial.planned, trial.made)
            held.made += trial.made

    def left_s(self) -> float | None:
        """Device-seconds that are left; None while nothing was made that could say how long an evaluation takes."""
        nfe = sum(part.spent_nfe for part in self._parts.values())
        if not nfe:
            return None
        overall = sum(part.spent_s for part in self._parts.values()) / nfe
        return sum(self._left(name, part, overall) for name, part in self._parts.items())

    def _left(self, name: str, part: _Part, overall: float) -> float:
        pace = part.spent_s / part.spent_nfe if part.spent_nfe else overall
        share = part.made / part.planned if part.made else 1.0
        running = [trial for trial in self._running.values() if trial.part == name]
        # Trials that the plan thought would work and that did not: refused, or found in the store after all.
        spared = max(part.idle - (part.trials - part.working), 0) * part.nfe / max(part.working, 1)
        ahead = max(part.nfe - part.planned - spared - sum(trial.planned for trial in running), 0.0)
        owed = sum(max(trial.planned * share - trial.made, 0.0) for trial in running)
        return (ahead * share + owed) * pace
