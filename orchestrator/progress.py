"""What a person sees while a study runs: bars on a terminal, plain lines in a log; and the same in numbers."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from orchestrator import telemetry
from orchestrator.forecast import Forecast
from orchestrator.ports import Load, WorkerLost
from orchestrator.recent import Recent

COMPANIONS = "companions"  # the forecast's part for rows that others are compared with
SPENT = ("nfe", "reward_calls", "device_s", "money")


class Rates:
    """Samples, evaluations and device-seconds a second, over the last minute or the last 16 shards (the longer).

    Args:
        now: seconds of a monotonic clock.
    """

    WINDOW_S, FEWEST = 60.0, 16

    def __init__(self, now: float) -> None:
        self._seen: deque[tuple[float, float, float, float]] = deque([(now, 0.0, 0.0, 0.0)])

    def add(self, now: float, samples: float, nfe: float, device_s: float) -> None:
        """A shard came in."""
        _, *sums = self._seen[-1]
        self._seen.append((now, sums[0] + samples, sums[1] + nfe, sums[2] + device_s))
        while len(self._seen) > self.FEWEST and self._seen[1][0] < now - self.WINDOW_S:
            self._seen.popleft()

    def per_second(self, now: float) -> tuple[float, float, float]:
        """The three rates."""
        began, *first = self._seen[0]
        _, *last = self._seen[-1]
        seconds = max(now - began, 1e-9)
        samples, nfe, device_s = ((b - a) / seconds for a, b in zip(first, last, strict=True))
        return samples, nfe, device_s


class Progress:
    """Trials, shards, rates, best values, spending and time left: on standard error, and as one ``snapshot``.

    Args:
        foreseen: what the plan expects: ``trials``, ``samples``, ``nfe``, ``reward_calls``, ``companions`` and, for the
            time left, ``parts`` (``orchestrator/forecast.py``).
        stream: where to write.
        interval_s: seconds between two plain lines.
        report: is given the state in numbers now and then, for ``solvus status`` in another terminal.
        report_s: seconds between two reports.
        load: says what the executor is doing.
        spent: says what the launch has spent, as the ledger's summary.
        goal: name and direction ("lower" or "higher") of the value that decides what is best.
        recent: keeps the last errors.
    """

    def __init__(
        self,
        foreseen: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        interval_s: float = 5.0,
        report: Callable[[dict[str, Any]], None] | None = None,
        report_s: float = 2.0,
        load: Callable[[], Load] = Load,
        spent: Callable[[], Mapping[str, float]] = dict,
        goal: tuple[str, str] | None = None,
        recent: Recent | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._foreseen, self._interval = dict(foreseen or {}), interval_s
        self._began, self._since = time.monotonic(), time.time()
        self._last = self._published = 0.0
        self._report, self._report_s, self._reported = report, report_s, time.monotonic()
        self._load, self._spent, self._goal, self._recent = load, spent, goal, recent or Recent()
        self._rates, self._forecast = Rates(self._began), Forecast(self._foreseen.get("parts", {}))
        self.trials = self.finished = self.failed = self.shards = self.shards_done = self.shards_lost = 0
        self.samples = self.reused = self.nfe = 0
        self.retries = {"damaged": 0, "isolated": 0}
        self.best: dict[str, dict[str, Any]] = {}
        self._aside: set[tuple[str, int]] = set()
        self._bar: Any = None
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), console=Console(file=self._stream),
            )  # fmt: skip
            self._task = self._bar.add_task("study", total=1.0, text="")
            self._bar.start()

    def began(self, trial: Any) -> None:
        """A trial was proposed."""
        self.trials += 1

    def planned(self, trial: Any, work: Any) -> None:
        """Its missing shards are known."""
        self.shards += len(work)
        if not trial.ahead:
            if trial.num_samples > trial.counted:  # the first time, or grown since
                self.reused += max(trial.num_samples - trial.counted - work.samples, 0)
                trial.had += max(trial.num_samples - trial.counted - work.samples, 0)
                trial.counted = trial.num_samples
            race = trial.proposal.race
            full = trial.num_samples if race is None else max(race.full, trial.num_samples)
            self._forecast.began(trial.number, trial.part, (full - trial.had) * trial.recipe.nfe)
        self.tick()

    def made(self, trial: Any, shard: Any, cost: dict[str, Any]) -> None:
        """A shard is committed."""
        self.shards_done += 1
        self.samples += cost["rows"]
        self.nfe += cost["nfe"]
        seconds = cost["generate_s"] + cost["score_s"]
        self._rates.add(time.monotonic(), cost["rows"], cost["nfe"], seconds)
        owner = (COMPANIONS, None) if trial.ahead else (trial.part, trial.number)
        self._forecast.spent(owner[0], cost["nfe"], seconds, owner[1])
        self.tick()

    def lost(self, trial: Any, shard: Any, error: BaseException) -> None:
        """A shard ended without rows: it will be made again, is cut in two, or failed."""
        self.shards_lost += 1
        if isinstance(error, WorkerLost):
            if shard.stop - shard.start > 1:
                self.shards += 2
                self.retries["isolated"] += 2
            else:
                self._aside.add((shard.key, shard.start))
        elif not trial.reason:
            self.retries["damaged"] += 1
        self.tick()

    def ended(self, trial: Any) -> None:
        """A trial has its values, or failed."""
        self.finished += 1
        self.failed += trial.state == "failed"
        self._forecast.ended(trial.number, trial.part)
        self._aside.update((trial.recipe.key, index) for index in trial.quarantined)
        if self._goal is not None and trial.state != "failed" and not trial.stopped:
            name, better = self._goal
            value, held = trial.values.get(name), self.best.get(trial.part)
            sign = 1 if better == "lower" else -1
            if value is not None and (held is None or sign * value < sign * held["value"]):
                self.best[trial.part] = {
                    "name": name, "value": value, "se": trial.errors.get(name), "nfe": trial.nfe,
                    "num_samples": trial.num_samples, "title": trial.title,
                }  # fmt: skip
        self.tick()

    def left_s(self) -> float | None:
        """About how many seconds are left, at the pace of the last minute; None while nothing tells."""
        left, pace = self._forecast.left_s(), self._rates.per_second(time.monotonic())[2]
        return None if left is None or pace <= 0 else left / pace

    def snapshot(self) -> dict[str, Any]:
        """The state in numbers, as plain data."""
        now, load, spent = time.monotonic(), self._load(), dict(self._spent())
        samples, nfe, device_s = self._rates.per_second(now)
        left = self.left_s()
        waiting = self.shards - self.shards_done - self.shards_lost - sum(load.stages.values())
        spent = {name: float(spent.get(name, 0.0)) for name in SPENT}
        allowed = {name: float(self._foreseen.get(name, 0.0)) for name in SPENT[:2]}
        remaining = self._forecast.left_s()
        if remaining is not None:
            allowed["device_s"] = spent["device_s"] + remaining
            rate = spent["money"] / spent["device_s"] if spent["device_s"] else 0.0
            allowed["money"] = rate * allowed["device_s"]
        return {
            "since": self._since,
            "elapsed_s": now - self._began,
            "left_s": left,
            "trials": {
                "foreseen": self._foreseen.get("trials", 0), "begun": self.trials, "finished": self.finished,
                "failed": self.failed,
            },
            "samples": {"made": self.samples, "reused": self.reused},
            "shards": {"planned": self.shards, "done": self.shards_done, "lost": self.shards_lost},
            "stages": {"waiting": max(waiting, 0), **load.stages},
            "devices": load.devices,
            "samples_per_s": samples,
            "nfe_per_s": nfe,
            "busy": min(device_s / max(load.devices, 1), 1.0),
            "best": self.best,
            "spent": spent,
            "budget": allowed,
            "retries": self.retries | {"lost_worker": load.retried},
            "quarantined": len(self._aside),
            "errors": self._recent.lines(),
        }  # fmt: skip

    def line(self) -> str:
        """The state in one line."""
        text = f"trials {self.finished}/{max(self.trials, self._foreseen.get('trials', 0))}"
        text += f" ({self.failed} failed)" if self.failed else ""
        text += f", shards {self.shards_done}/{self.shards}, {self.samples:,} samples made, {self.reused:,} reused"
        text += f", {self._rates.per_second(time.monotonic())[0]:,.0f} samples/s"
        left = self.left_s()
        return text if not left else f"{text}, about {duration(left)} left"

    def tick(self) -> None:
        """Show the state if it is time to."""
        now = time.monotonic()
        if self._report is not None and now - self._reported > self._report_s:
            self._reported = now
            self.report()
        if telemetry.is_heard() and now - self._published > 1.0:
            self._published = now
            publish(self.snapshot())
        if self._bar is not None:
            left, elapsed = self.left_s(), now - self._began
            self._bar.update(
                self._task, completed=0.0 if left is None else elapsed / (elapsed + left), text=self.line()
            )
        elif now - self._last >= self._interval:
            self._last = now
            print(f"[{duration(now - self._began)}] {self.line()}", file=self._stream, flush=True)

    def report(self) -> None:
        """Tell whoever asked for it."""
        if self._report is not None:
            numbers = {"trials": self.finished, "samples_made": self.samples, "progress": self.line()}
            self._report(numbers | {"live": self.snapshot()})

    def close(self) -> None:
        """Show the final state."""
        if telemetry.is_heard():
            publish(self.snapshot())
        if self._bar is not None:
            self.tick()
            self._bar.stop()
            self._bar = None
        else:
            print(f"[{duration(time.monotonic() - self._began)}] {self.line()}", file=self._stream, flush=True)


def publish(state: Mapping[str, Any]) -> None:
    """Set the driver's gauges from a snapshot."""
    say = telemetry.record
    for kind, count in state["trials"].items():
        say("solvus_trials", count, state=kind)
    for kind, count in state["samples"].items():
        say("solvus_samples", count, state=kind)
    for stage, count in state["stages"].items():
        say("solvus_queue", count, stage=stage)
    say("solvus_devices", state["devices"])
    say("solvus_device_busy_ratio", state["busy"])
    for reason, count in state["retries"].items():
        say("solvus_retries", count, reason=reason)
    say("solvus_quarantined", state["quarantined"])
    for part, best in state["best"].items():
        say("solvus_best", best["value"], part=part, value=best["name"])
    for name, amount in state["spent"].items():
        say("solvus_spent", amount, of=name)
    for name, amount in state["budget"].items():
        say("solvus_budget", amount, of=name)
    if state["left_s"] is not None:
        say("solvus_left_seconds", state["left_s"])


def duration(seconds: float) -> str:
    """``M:SS`` or ``H:MM:SS``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
