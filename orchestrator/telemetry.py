"""What a running study says of itself in numbers: one catalogue of meters, and the sinks that they go to.

Workers count what they make and time their stages; the driver sets gauges from its own state once a second. Without a
sink, saying something costs a truth test. Prometheus sees a counter ``NAME_total``, a gauge ``NAME`` and a histogram
``NAME_bucket``, ``NAME_sum`` and ``NAME_count``; Ray puts ``ray_`` in front of all of them. All carry the label
``study``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger("solvus")

# Bounds of the histograms, in seconds: from a tiny shard on exact models to one of hours.
BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Meter:
    """One number that changes.

    Attributes:
        kind: "counter" (only rises), "gauge" or "histogram" (of seconds).
        help: what it means, in a sentence.
        labels: what tells its series apart, beside the study.
    """

    kind: str
    help: str
    labels: tuple[str, ...] = ()

    def exposed(self, name: str) -> tuple[str, ...]:
        """The names of its series in Prometheus, without Ray's prefix."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(name + ending for ending in endings[self.kind])


METERS: dict[str, Meter] = {
    # Workers.
    "solvus_rows": Meter("counter", "Samples made."),
    "solvus_nfe": Meter("counter", "Network evaluations made; states taken over from another trial are not in it."),
    "solvus_device_seconds": Meter("counter", "Seconds for which a device was held, by generate or score.", ("stage",)),
    "solvus_stage_seconds": Meter("histogram", "Seconds of a shard in a stage, with waiting.", ("stage",)),
    "solvus_reward_seconds": Meter("histogram", "Seconds that a scorer took for one call.", ("scorer",)),
    "solvus_scored": Meter("counter", "Samples that a scorer scored.", ("scorer",)),
    # The driver.
    "solvus_trials": Meter("gauge", "Trials: foreseen (at most), begun, finished, failed.", ("state",)),
    "solvus_samples": Meter("gauge", "Samples of this launch: made, or reused from the store.", ("state",)),
    "solvus_queue": Meter("gauge", "Shards that wait in the plan, or are in a stage.", ("stage",)),
    "solvus_devices": Meter("gauge", "Workers that generate."),
    "solvus_device_busy_ratio": Meter("gauge", "Share of the last minute or more for which a device was held."),
    "solvus_retries": Meter("gauge", "Shards that had to run again since the launch, by reason.", ("reason",)),
    "solvus_quarantined": Meter("gauge", "Rows of this launch's trials that were set aside."),
    "solvus_best": Meter("gauge", "Best value of a part so far.", ("part", "value")),
    "solvus_spent": Meter("gauge", "Spent by this launch: nfe, reward_calls, device_s, money.", ("of",)),
    "solvus_budget": Meter("gauge", "What the plan allows at most, or what is expected in all, of the same.", ("of",)),
    "solvus_left_seconds": Meter("gauge", "About how long the study will still take."),
}


class Sink(Protocol):
    """Somewhere that numbers go. Losing one costs a log line, never a result."""

    def record(self, name: str, meter: Meter, value: float, labels: Mapping[str, str]) -> None: ...
    def close(self) -> None: ...


_sinks: list[Sink] = []


def open_sink(sink: Sink) -> Sink:
    """From now on, numbers of this process go there too."""
    _sinks.append(sink)
    return sink


def close_sink(sink: Sink) -> None:
    """They do not any more."""
    if sink in _sinks:
        _sinks.remove(sink)
    sink.close()


def is_heard() -> bool:
    """Whether anybody listens."""
    return bool(_sinks)


def record(name: str, value: float, /, **labels: Any) -> None:
    """Add to a counter, set a gauge, or note one time in a histogram.

    Args:
        name: one of ``METERS``.
        value: the increment, the level, or seconds; a counter takes nothing below or equal to 0.
        labels: the meter's labels.
    """
    if not _sinks:
        return
    meter = METERS[name]
    assert set(labels) == set(meter.labels), (name, labels)
    if meter.kind == "counter" and value <= 0:
        return
    for sink in list(_sinks):
        try:
            sink.record(name, meter, float(value), {key: str(text) for key, text in labels.items()})
        except Exception as error:  # numbers about a run must never end it
            _sinks.remove(sink)
            log.warning("numbers are not sent to %s any more: %s", type(sink).__name__, error)
