"""Numbers of a driver or worker through Ray's metrics: every node's agent serves them to Prometheus as ``ray_NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.telemetry import BUCKETS, Meter


class RayMetrics:
    """A sink over ``ray.util.metrics``; needs a process that is connected to Ray.

    Args:
        study: the label ``study`` of everything.
    """

    def __init__(self, study: str) -> None:
        self._study, self._series = study, dict[str, Any]()

    def record(self, name: str, meter: Meter, value: float, labels: Mapping[str, str]) -> None:
        """Add, set or note a value."""
        from ray.util import metrics

        series: Any = self._series.get(name)
        if series is None:
            kinds: dict[str, Any] = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
            more = {"boundaries": list(BUCKETS)} if meter.kind == "histogram" else {}
            series = kinds[meter.kind](name, meter.help, tag_keys=("study", *meter.labels), **more)
            self._series[name] = series
        tags = {"study": self._study, **labels}
        if meter.kind == "counter":
            series.inc(value, tags=tags)
        elif meter.kind == "gauge":
            series.set(value, tags=tags)
        else:
            series.observe(value, tags=tags)

    def close(self) -> None:
        """Nothing to end: the agent forgets a process that is gone."""
