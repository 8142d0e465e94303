"""``solvus status --follow``: what a running study says of itself, for people and for programs."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import follow
from orchestrator.ports import Load, WorkerLost
from orchestrator.progress import Progress
from orchestrator.recent import Recent
from orchestrator.results import Results

Solvus = Callable[..., Any]
COST = {"rows": 16, "nfe": 64, "generate_s": 1.5, "score_s": 0.5}


def a_trial(number: int, value: float | None = None, **more: Any) -> Any:
    fields = {"number": number, "part": "search", "ahead": frozenset(), "counted": 0, "had": 0, "num_samples": 32,
              "proposal": SimpleNamespace(race=None), "state": "complete", "stopped": False, "reason": "", "nfe": 4,
              "recipe": SimpleNamespace(nfe=4, key="abc"), "quarantined": {}, "errors": {"quality/x": 0.5},
              "values": {} if value is None else {"quality/x": value},
              "title": f"#{number} [red]a title[/red]"}  # fmt: skip
    return SimpleNamespace(**fields | more)


def work(samples: int, shards: int) -> Any:
    return type("Work", (), {"samples": samples, "__len__": lambda self: shards})()


def watched(**more: Any) -> Progress:
    foreseen = {
        "trials": 4,
        "nfe": 512,
        "reward_calls": 0,
        "parts": {"search": {"trials": 4, "working": 4, "nfe": 512}},
    }
    options: dict[str, Any] = {"stream": io.StringIO(), "goal": ("quality/x", "lower")}
    return Progress(foreseen, **options | more)


def test_a_snapshot_counts_shards_values_spending_and_what_is_left() -> None:
    load = Load({"generate": 1, "score": 1}, devices=2, retried=1)
    money = {"nfe": 192.0, "reward_calls": 0.0, "device_s": 6.0, "money": 3.0}
    watch = watched(load=lambda: load, spent=lambda: money)
    first, second = a_trial(0, 3.0), a_trial(1, 2.0)
    for trial in (first, second, a_trial(2)):
        watch.began(trial)
        watch.planned(trial, work(32, 2))
    for trial in (first, first, second, second):
        watch.made(trial, None, COST)
    watch.ended(first)
    watch.ended(second)
    state = watch.snapshot()
    assert state["trials"] == {"foreseen": 4, "begun": 3, "finished": 2, "failed": 0}
    assert state["stages"] == {"waiting": 0, "generate": 1, "score": 1} and state["shards"]["done"] == 4
    assert state["best"]["search"]["value"] == 2.0 and state["best"]["search"]["title"] == second.title
    assert state["spent"] == money
    # Two trials of 128 evaluations took 8 device-seconds; two more are to come.
    assert state["budget"]["device_s"] == pytest.approx(6.0 + 8.0) and state["budget"]["nfe"] == 512
    assert state["budget"]["money"] == pytest.approx(7.0)
    assert state["left_s"] == pytest.approx(8.0 / (8.0 / state["elapsed_s"]), rel=0.2)
    assert state["retries"] == {"damaged": 0, "isolated": 0, "lost_worker": 1}
    json.dumps(state)


def test_the_best_of_a_part_is_neither_a_failed_trial_nor_one_that_a_race_stopped() -> None:
    watch = watched(goal=("quality/x", "higher"))
    for trial in (a_trial(0, 1.0), a_trial(1, 9.0, state="failed"), a_trial(2, 8.0, stopped=True), a_trial(3, 2.0)):
        watch.ended(trial)
    assert watch.snapshot()["best"]["search"]["value"] == 2.0


def test_a_shard_that_kills_its_worker_is_counted_until_its_row_is_set_aside() -> None:
    watch, trial = watched(), a_trial(0)
    watch.planned(trial, work(2, 1))
    watch.lost(trial, SimpleNamespace(key="abc", start=0, stop=2), WorkerLost())
    watch.lost(trial, SimpleNamespace(key="abc", start=0, stop=1), WorkerLost())
    watch.made(trial, None, COST)
    state = watch.snapshot()
    assert (state["shards"], state["stages"]["waiting"]) == ({"planned": 3, "done": 1, "lost": 2}, 0)
    assert (state["retries"]["isolated"], state["quarantined"]) == (2, 1)
    watch.ended(a_trial(0, quarantined={0: "kills its worker"}))
    assert watch.snapshot()["quarantined"] == 1


def test_the_last_errors_are_kept_without_secrets() -> None:
    recent = Recent(most=2)
    log = logging.getLogger("solvus.test_follow")
    log.addHandler(recent)
    try:
        for number in range(3):
            log.warning("%d: cannot reach https://me:hunter2@host/", number)
    finally:
        log.removeHandler(recent)
    assert [text[0] for _, text in recent.lines()] == ["1", "2"]
    assert "hunter2" not in str(recent.lines())


@pytest.fixture
def running(tmp_path: Path) -> Results:
    """A study whose state says that this process runs it."""
    results = Results(str(tmp_path), "tiny")
    results.files.write("study.json", b"{}")
    recent = Recent()
    recent.emit(logging.makeLogRecord({"msg": "a worker was lost [bold]", "levelno": logging.WARNING}))
    watch = watched(recent=recent, load=lambda: Load({"generate": 3}, 2))
    trial = a_trial(0, 3.0)
    watch.began(trial)
    watch.planned(trial, work(32, 2))
    watch.made(trial, None, COST)
    watch.ended(trial)
    results.save_state("running", {"live": watch.snapshot()})
    return results


def end(results: Results, state: str = "complete") -> None:
    results.save_state(state, {"trials": 4, "samples_made": 128, "wall_s": 65.0})


def test_people_see_stages_speed_best_value_spending_and_errors(running: Results) -> None:
    shown = dict(follow.lines(running.state()))
    assert "of at most 4" in shown["trials"] and "3 in generate" in shown["shards"]
    assert "samples/s" in shown["speed"] and "NFE/s" in shown["speed"] and "2 devices busy" in shown["speed"]
    assert "search: quality/x 3 ± 0.98 at 4 NFE" in shown["best"]
    assert "of at most 512 NFE" in shown["spent"] and "a worker was lost" in shown["errors"]
    assert "left" in shown["state"]


def test_following_ends_with_the_study_and_with_its_exit_status(
    running: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = running.state()["summary"]
    for state, code in (("complete", 0), ("degraded", 3), ("failed", 1), ("interrupted", 130)):
        running.save_state("running", summary)
        monkeypatch.setattr(time, "sleep", lambda _, state=state: end(running, state))
        stream = io.StringIO()
        assert follow.follow(running, as_json=False, stream=stream) == code
        first, last = stream.getvalue().splitlines()
        assert "samples/s" in first and last == f"tiny: state {state}: 4 trials, 128 samples made in 1:05"


def test_for_programs_every_state_is_one_json_object(running: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: end(running))
    stream = io.StringIO()
    follow.follow(running, as_json=True, stream=stream)
    first, last = map(json.loads, stream.getvalue().splitlines())
    assert first["summary"]["live"]["devices"] == 2 and last["state"] == "complete" and first["study"] == "tiny"


def test_on_a_terminal_the_view_stays_in_place_and_shows_titles_as_they_are(
    running: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: end(running))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    assert follow.follow(running, as_json=False, stream=stream) == 0
    assert "[red]a title[/red]" in stream.getvalue() and "a worker was lost [bold]" in stream.getvalue()


def test_a_run_leaves_its_state_for_another_terminal_while_it_runs(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    original = Results.save_state

    def kept(self: Results, state: str, summary: Any) -> None:
        seen.append({"state": state} | dict(summary))
        original(self, state, summary)

    monkeypatch.setattr(Results, "save_state", kept)
    monkeypatch.setattr("orchestrator.progress.Progress.tick", Progress.report)
    argv = ["study=tiny", "search.space={nfe:[3,5]}", "num_samples=64", "batch_size=32", "shard_size=32"]
    assert solvus("run", *argv, "metrics=[]", "tracker=none", f"root={tmp_path}").code == 0
    live = [state["live"] for state in seen if "live" in state]
    assert seen[0]["foreseen"]["parts"] == {"solvers": {"trials": 2, "working": 2, "nfe": 64 * 8}}
    assert live[-1]["trials"] == {"foreseen": 2, "begun": 2, "finished": 2, "failed": 0}
    assert live[-1]["spent"]["nfe"] == 64 * 8 == live[-1]["budget"]["nfe"]
    assert live[-1]["left_s"] == 0.0 and any(state["left_s"] for state in live)
    assert live[-1]["best"]["solvers"]["name"] == "cost/nfe"


def test_follow_asks_which_study_unless_exactly_one_runs(solvus: Solvus, tmp_path: Path, finished: Path) -> None:
    done = solvus("status", "--follow", f"root={finished}")
    assert done.code == 2 and "none runs" in done.err
    done = solvus("status", "--follow", "study=tiny", f"root={finished}")
    assert done.code == 0 and "state complete" in done.out
    for name in ("a", "b"):
        results = Results(str(tmp_path), name)
        results.files.write("study.json", b"{}")
        results.save_state("running", {"pid": os.getpid(), "host": socket.gethostname()})
    assert "these run: a, b" in solvus("status", "--follow", f"root={tmp_path}").err
