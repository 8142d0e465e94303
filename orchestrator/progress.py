"""What a person sees while a study runs: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Progress:
    """Trials, shards, samples per second and time left, on standard error.

    Args:
        expected: samples that the plan foresees in all, for the time left.
        stream: where to write.
        interval_s: seconds between two plain lines.
        report: is given the state in numbers now and then, for ``solvus status`` in another terminal.
    """

    def __init__(
        self,
        expected: int = 0,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._expected, self._interval = expected, interval_s
        self._began = time.monotonic()
        self._last = 0.0
        self._report, self._reported = report, time.monotonic()
        self.trials = self.finished = self.failed = self.shards = self.shards_done = 0
        self.samples = self.reused = self.nfe = 0
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), console=Console(file=self._stream),
            )  # fmt: skip
            self._task = self._bar.add_task("study", total=max(expected, 1), text="")
            self._bar.start()

    def began(self, trial: Any) -> None:
        """A trial was proposed."""
        self.trials += 1

    def planned(self, trial: Any, work: Any) -> None:
        """Its missing shards are known."""
        self.shards += len(work)
        if trial.num_samples > trial.counted and not trial.ahead:  # the first time, or grown since
            self.reused += max(trial.num_samples - trial.counted - work.samples, 0)
            trial.counted = trial.num_samples
        self.tick()

    def made(self, trial: Any, shard: Any, cost: dict[str, Any]) -> None:
        """A shard is committed."""
        self.shards_done += 1
        self.samples += cost["rows"]
        self.nfe += cost["nfe"]
        self.tick()

    def ended(self, trial: Any) -> None:
        """A trial has its values, or failed."""
        self.finished += 1
        self.failed += trial.state == "failed"
        self.tick()

    def line(self) -> str:
        """The state in one line."""
        elapsed = time.monotonic() - self._began
        rate = self.samples / elapsed if elapsed > 0 else 0.0
        text = f"trials {self.finished}/{self.trials}"
        text += f" ({self.failed} failed)" if self.failed else ""
        text += f", shards {self.shards_done}/{self.shards}, {self.samples:,} samples made, {self.reused:,} reused"
        text += f", {rate:,.0f} samples/s"
        left = self._expected - self.samples - self.reused
        if self._expected and rate > 0 and left > 0:
            text += f", about {_duration(left / rate)} left"
        return text

    def tick(self) -> None:
        """Show the state if it is time to."""
        now = time.monotonic()
        if self._report is not None and now - self._reported > 10:
            self._reported = now
            self._report({"trials": self.finished, "samples_made": self.samples, "progress": self.line()})
        if self._bar is not None:
            self._bar.update(
                self._task, completed=min(self.samples + self.reused, max(self._expected, 1)), text=self.line()
            )
        elif now - self._last >= self._interval:
            self._last = now
            print(f"[{_duration(now - self._began)}] {self.line()}", file=self._stream, flush=True)

    def close(self) -> None:
        """Show the final state."""
        if self._bar is not None:
            self.tick()
            self._bar.stop()
            self._bar = None
        else:
            print(f"[{_duration(time.monotonic() - self._began)}] {self.line()}", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
