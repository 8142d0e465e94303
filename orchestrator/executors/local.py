"""In this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from orchestrator import telemetry
from orchestrator.ports import Load
from orchestrator.registries import executors

# Endpoints of this process, by port.
_OPEN: dict[int, telemetry.Sink] = {}


@executors.register("local")
@dataclass(frozen=True)
class LocalExecutor:
    """Run every task here and now: simplest to debug, and what a cluster's results are compared with.

    Args:
        metrics_port: where to serve numbers to Prometheus, ``http://127.0.0.1:PORT/metrics``; 0 serves none.

    Reference: none needed.
    """

    metrics_port: int = 0

    slots = 1

    def __post_init__(self) -> None:
        if not 0 <= self.metrics_port < 65536:
            raise ValueError(f"executor.metrics_port must lie in 0..65535 (0: none), got {self.metrics_port}.")

    def start(self, study: str = "") -> LocalExecutor:
        """Itself, with its endpoint open if it has one; ``study`` labels what is served."""
        if self.metrics_port:
            from orchestrator.adapters.prometheus_endpoint import Endpoint

            _OPEN[self.metrics_port] = telemetry.open_sink(Endpoint(self.metrics_port, study))
        return self

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        """Run it; the future is finished when this returns."""
        future: Future = Future()
        try:
            future.set_result(function(task))
        except Exception as error:  # a task's failure is its result; an interrupt is not
            future.set_exception(error)
        return future

    def load(self) -> Load:
        """Tasks end before anybody can ask."""
        return Load()

    def close(self) -> None:
        """Close the endpoint."""
        if self.metrics_port in _OPEN:
            telemetry.close_sink(_OPEN.pop(self.metrics_port))
