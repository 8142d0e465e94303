"""The container's entry point, as a plain process: what it becomes, what it refuses, and that signals reach it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "entrypoint.sh"
TOKEN = "0123456789abcdef" * 4


def environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """Nothing of this process but a PATH on which stand-ins come first."""
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        **extra,
    }


def stand_in(tmp_path: Path, name: str, body: str) -> None:
    """A program of that name that does something else."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(tmp_path: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """The entry point to its end."""
    return subprocess.run(
        ["sh", str(SCRIPT), *arguments], env=environment(tmp_path, **extra), capture_output=True, text=True, timeout=30
    )


def dry(tmp_path: Path, *arguments: str, **extra: str) -> list[str]:
    """The command line that it would become."""
    done = run(tmp_path, *arguments, SOLVUS_DRY_RUN="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **extra)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return shlex.split(done.stdout)


def test_a_head_listens_on_loopback_and_outside_the_workers_ports(tmp_path: Path) -> None:
    assert dry(tmp_path, "head", "--num-cpus=0") == [
        "ray", "start", "--head", "--block", "--disable-usage-stats", "--port=6379", "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265", "--num-cpus=0",
    ]  # fmt: skip


def test_port_dashboard_and_address_come_from_the_environment(tmp_path: Path) -> None:
    command = dry(tmp_path, "head", RAY_PORT="20001", RAY_DASHBOARD_HOST="0.0.0.0", RAY_NODE_HOST="10.1.2.3")
    assert {"--port=20001", "--dashboard-host=0.0.0.0", "--node-ip-address=10.1.2.3"} <= set(command)
    assert "--node-ip-address=127.0.0.1" in dry(tmp_path, "worker", "h:6379", RAY_NODE_HOST="localhost")


def test_a_worker_joins_the_address(tmp_path: Path) -> None:
    assert dry(tmp_path, "worker", "10.0.0.1:6379", '--resources={"a": 1}') == [
        "ray", "start", "--address=10.0.0.1:6379", "--block", "--disable-usage-stats", '--resources={"a": 1}',
    ]  # fmt: skip


def test_arguments_of_solvus_arrive_as_they_are(tmp_path: Path) -> None:
    arguments = ["run", "search.space={nfe:[4,8]}", "question=what's new?", "", "name=ä b"]
    assert dry(tmp_path, "solvus", *arguments) == ["solvus", *arguments]


@pytest.mark.parametrize("role", [["head"], ["worker", "10.0.0.1:6379"]])
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "RAY_AUTH_MODE"),
        ({"RAY_AUTH_TOKEN": TOKEN}, "RAY_AUTH_MODE"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN}, "RAY_AUTH_MODE"),
        ({"RAY_AUTH_MODE": "token"}, "no token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}, "no token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "short"}, "characters"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "REPLACE_ME_WITH_OPENSSL_RAND_HEX_32"}, "placeholder"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "cannot be read"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/dev/null"}, "characters"),
    ],
)
def test_no_node_without_a_token(tmp_path: Path, role: list[str], extra: dict[str, str], said: str) -> None:
    stand_in(tmp_path, "ray", 'echo "ray $*" >> "$CALLS"')
    done = run(tmp_path, *role, **extra)
    assert done.returncode == 64
    assert said in done.stderr
    assert not (tmp_path / "calls").exists(), "ray was started"


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["serve"], ["worker"], ["worker", "nowhere"], ["worker", ":6379"], ["head", "--dashboard-host=0.0.0.0"],
        ["head", "--port=10005"], ["worker", "h:6379", "--address=evil:6379"], ["worker", "h:6379", "--head"],
    ],
)  # fmt: skip
def test_wrong_usage_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    done = run(tmp_path, *arguments, SOLVUS_DRY_RUN="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("entrypoint: ")


@pytest.mark.parametrize("port", ["10002", "15000", "19999", "many", ""])
def test_a_port_of_rays_workers_is_refused(tmp_path: Path, port: str) -> None:
    done = run(tmp_path, "head", SOLVUS_DRY_RUN="1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_PORT=port)
    if port:
        assert done.returncode == 64 and "RAY_PORT" in done.stderr
    else:
        assert "--port=6379" in done.stdout


def start(tmp_path: Path, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    """The entry point, running."""
    env = environment(tmp_path, RAY_AUTH_MODE="token", **extra)
    return subprocess.Popen(["sh", str(SCRIPT), *arguments], env=env, stdout=subprocess.PIPE, text=True)


def wait_for(calls: Path, text: str, timeout: float = 10.0) -> str:
    """What the stand-ins noted, once that is among it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if calls.exists() and text in calls.read_text():
            return calls.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{text!r} did not come")


def test_a_head_becomes_ray_and_gets_the_signal(tmp_path: Path) -> None:
    stand_in(
        tmp_path,
        "ray",
        "trap 'echo stopped >> \"$CALLS\"; exit 7' TERM\n"
        'echo "pid $$ threads $OMP_NUM_THREADS token $RAY_AUTH_TOKEN_PATH" >> "$CALLS"\n'
        "for i in $(seq 100); do sleep 0.05; done",
    )
    (tmp_path / "token").write_text(TOKEN)
    with start(tmp_path, "head", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")) as process:
        said = wait_for(tmp_path / "calls", "pid ")
        assert said == f"pid {process.pid} threads 1 token {tmp_path / 'token'}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 7
    assert "stopped" in (tmp_path / "calls").read_text()


def test_a_worker_waits_for_the_head_and_then_becomes_ray(tmp_path: Path) -> None:
    body = '[[ $1 == start ]] || [[ $(grep -c health "$CALLS") -gt 1 ]]'
    stand_in(tmp_path, "ray", f'echo "$*" >> "$CALLS"\n{body}')
    with start(tmp_path, "worker", "h:6379", RAY_AUTH_TOKEN=TOKEN) as process:
        assert process.wait(20) == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        "health-check --address h:6379",
        "health-check --address h:6379",
        "start --address=h:6379 --block --disable-usage-stats",
    ]


def test_the_wait_is_bounded_and_can_be_stopped(tmp_path: Path) -> None:
    stand_in(tmp_path, "ray", 'echo "$1" >> "$CALLS"\nexit 1')
    with start(tmp_path, "worker", "h:6379", RAY_AUTH_TOKEN=TOKEN, RAY_WAIT_S="0") as process:
        assert process.wait(10) == 1
    with start(tmp_path, "worker", "h:6379", RAY_AUTH_TOKEN=TOKEN, RAY_WAIT_S="1000") as process:
        wait_for(tmp_path / "calls", "health-check\nhealth-check")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert "start" not in (tmp_path / "calls").read_text()


def test_the_real_command_line_starts(tmp_path: Path) -> None:
    env = environment(tmp_path) | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin"}
    done = subprocess.run([str(SCRIPT), "solvus", "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage: solvus" in done.stdout
