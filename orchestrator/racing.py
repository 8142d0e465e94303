"""Racing: a trial starts on few samples and grows only while it may still win.

All trials share sample indices, so a trial with n samples is compared with the best finished trial (the incumbent) on
the same n indices: the paired difference D of the two values, with its standard error from the rows' influences. At
each look but the last the trial is stopped if

    D > 0  and  D - z se > -margin |incumbent|,      z = Phi^{-1}(1 - error / (J - 1)),

with D > 0 meaning worse, J the number of looks. So a trial whose true value beats the incumbent of each look by the
margin or more is stopped with probability at most ``error``, over all its looks together (Bonferroni over looks; as far
as the normal approximation holds). A stopped trial tells its search the incumbent's value plus D: values at different
sample counts have different biases, differences on equal samples hardly have.

Reference: Birattari et al. 2002, "A Racing Algorithm for Configuring Metaheuristics"; Jennison and Turnbull 1999,
"Group Sequential Methods" (repeated looks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

from orchestrator.measure import Cluster, Influences, influences, paired_difference
from tasks import registry
from tasks.registry import Spec, coerce, unknown


@dataclass(frozen=True)
class Racing:
    """How a race is run.

    Attributes:
        start: samples of the first look.
        factor: how many times more at each further look, up to the trial's full number.
        error: largest probability that a trial which beats the incumbent by the margin is stopped.
        margin: the least improvement that counts, as a fraction of the incumbent's value.
    """

    start: int = 256
    factor: float = 2.0
    error: float = 0.05
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.start < 8:
            raise ValueError(f"search.racing.start must be at least 8 samples, got {self.start}.")
        if not self.factor > 1:
            raise ValueError(f"search.racing.factor must be above 1, got {self.factor}.")
        if not 0 < self.error < 0.5:
            raise ValueError(f"search.racing.error must lie between 0 and 0.5, got {self.error}.")
        if self.margin < 0:
            raise ValueError(f"search.racing.margin must not be negative, got {self.margin}.")

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Racing | None:
        """The settings of plain data; None for an empty mapping, which means no race."""
        if not data:
            return None
        known = {f.name: type(f.default) for f in fields(cls)}
        for key in data:
            if key not in known:
                raise unknown("field of search.racing:", key, list(known), "Fields")
        return cls(**{key: coerce(value, known[key], f"search.racing.{key}") for key, value in data.items()})

    def looks(self, full: int) -> tuple[int, ...]:
        """Sample counts at which a trial is looked at; the last is the full one."""
        counts = [min(self.start, full)]
        while counts[-1] < full:
            counts.append(min(full, math.ceil(counts[-1] * self.factor)))
        return tuple(counts)

    def quantile(self, full: int) -> float:
        """z: how many standard errors away from a chance a trial must be to be stopped."""
        decisions = max(len(self.looks(full)) - 1, 1)
        return NormalDist().inv_cdf(1.0 - self.error / decisions)


@dataclass
class Look:
    """What one look at a trial found.

    Attributes:
        samples: on how many samples.
        value: the trial's value there.
        difference: its difference from the incumbent on the same samples; worse is positive.
        error: standard error of the difference.
    """

    samples: int
    value: float
    difference: float | None = None
    error: float | None = None


class Race:
    """One race: the incumbent, and who is stopped.

    Args:
        settings: the rule.
        objective: name of the value that decides.
        minimize: whether less is better.
        full: samples of a trial that goes all the way.
        device_s: device-seconds of a sample above which a trial cannot win.
    """

    def __init__(self, settings: Racing, objective: str, minimize: bool, full: int, device_s: float = math.inf) -> None:
        self.settings, self.objective, self.full, self._device_s = settings, objective, full, device_s
        self._sign = 1.0 if minimize else -1.0
        self._z = settings.quantile(full)
        self._incumbent: Any = None
        self._effects: dict[int, Influences] = {}

    @property
    def start(self) -> int:
        """Samples of a new trial."""
        return self.settings.looks(self.full)[0]

    def look(
        self, trial: Any, metrics: list[Spec], store: Any, cluster: Cluster | None = None, may_win: bool = True
    ) -> int | None:
        """Look at a measured trial.

        Args:
            trial: with its values and its cost on ``num_samples`` samples; ``looks``, ``stopped`` and ``estimate`` are
                filled in.
            metrics: the study's.
            store: where the rows lie.
            cluster: what rows are alike in.
            may_win: False for a trial that fails for another reason; others are not held against it.

        Returns:
            the number of samples it is to have now, or None when it is decided.
        """
        value = trial.values[self.objective]
        found = Look(trial.num_samples, value)
        trial.looks.append(found)
        if trial.num_samples >= self.full:
            if may_win and (trial.seconds or 0.0) <= self._device_s:
                self._crown(trial)
            return None
        rival = self._incumbent
        if rival is not None and rival.first_index == trial.first_index:
            self._compare(trial, rival, found, metrics, store, cluster)
        # A trial of an earlier launch keeps what it had then.
        if trial.proposal.settled or (found.difference is not None and self._is_beaten(found, rival)):
            trial.stopped = True
            best = value if rival is None else rival.values[self.objective]
            trial.estimate = value if found.difference is None else best + self._sign * found.difference
            return None
        return next(n for n in self.settings.looks(self.full) if n > trial.num_samples)

    def _compare(
        self, trial: Any, rival: Any, found: Look, metrics: list[Spec], store: Any, cluster: Cluster | None
    ) -> None:
        """Fill in the paired difference from the incumbent."""
        spec = next(m for m in metrics if self.objective in registry.metrics.build(m).better)
        first, stop = trial.first_index, trial.first_index + trial.num_samples
        mine = influences(trial.recipe, spec, self.objective, first, stop, store, cluster)
        if trial.num_samples not in self._effects:
            self._effects[trial.num_samples] = influences(
                rival.recipe, spec, self.objective, first, stop, store, cluster
            )
        difference, error = paired_difference(mine, self._effects[trial.num_samples])
        if math.isfinite(error):  # two rows in common, or clusters
            found.difference, found.error = self._sign * difference, error

    def _is_beaten(self, found: Look, rival: Any) -> bool:
        assert found.difference is not None and found.error is not None
        slack = self.settings.margin * abs(rival.values[self.objective])
        return found.difference > 0 and found.difference - self._z * found.error > -slack

    def _crown(self, trial: Any) -> None:
        best = self._incumbent
        if best is None or self._sign * (trial.values[self.objective] - best.values[self.objective]) < 0:
            self._incumbent, self._effects = trial, {}
