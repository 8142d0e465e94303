"""A Prometheus endpoint of this process, for runs without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.telemetry import BUCKETS, Meter


class Endpoint:
    """Serves what this process says at ``http://127.0.0.1:PORT/metrics``, from a thread of its own.

    Args:
        port: where; 0 takes a free one, which ``port`` then names.
        study: the label ``study`` of everything.

    Raises:
        ValueError: the port is taken.
    """

    def __init__(self, port: int, study: str) -> None:
        import prometheus_client

        self._client, self._study = prometheus_client, study
        # A registry of its own: a second launch in this process begins at nought and collides with nothing.
        self._registry = prometheus_client.CollectorRegistry()
        self._series: dict[str, Any] = {}
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, "127.0.0.1", self._registry)
        except OSError as error:
            raise ValueError(
                f"executor.metrics_port {port} cannot be opened: {error.strerror}. Choose another, or 0 for none."
            ) from None
        self.port = self._server.server_port

    def record(self, name: str, meter: Meter, value: float, labels: Mapping[str, str]) -> None:
        """Add, set or note a value."""
        series = self._series.get(name)
        if series is None:
            kinds = {"counter": self._client.Counter, "gauge": self._client.Gauge, "histogram": self._client.Histogram}
            more = {"buckets": BUCKETS} if meter.kind == "histogram" else {}
            names = ("study", *meter.labels)
            series = kinds[meter.kind](name, meter.help, names, registry=self._registry, **more)
            self._series[name] = series
        one = series.labels(study=self._study, **labels)
        if meter.kind == "counter":
            one.inc(value)
        elif meter.kind == "gauge":
            one.set(value)
        else:
            one.observe(value)

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
