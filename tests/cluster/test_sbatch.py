"""The Slurm script against stand-ins for Slurm, Ray and solvus: what it starts, where, and what it leaves behind."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "solvus.sbatch"
NODES = ["n1", "n2", "n3"]

# Each notes what it was called with. srun runs the command here and hands on SIGTERM, as the real one does.
STAND_INS = {
    "srun": r"""
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
"$@" &
child=$!
trap 'kill -TERM $child; wait $child; echo "stopped $*" >> "$CALLS"; exit 143' TERM
wait $child
""",
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [[ $1 != show ]] || printf "%s\\n" $FAKE_NODES',
    "hostname": "echo 127.0.1.1 fe80::1 10.1.2.3 10.9.9.9",
    "ray": r"""
case $1 in
    start) exec sleep 60 ;;
    status) printf ' 1 node_c0ffee%s\n' ${FAKE_JOINED-$FAKE_NODES} ;;
esac
""",
    "solvus": r"""
echo "solvus $*" >> "$CALLS"
file=$RAY_AUTH_TOKEN_PATH
echo "auth $RAY_AUTH_MODE $(stat -c %a "$file") $(cat "$file") ${RAY_AUTH_TOKEN:-}" >> "$CALLS"
trap "$FAKE_TRAP" TERM
for i in $(seq "${FAKE_TICKS:-2}"); do sleep 0.05; done
exit "${FAKE_STATUS:-0}"
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on three nodes, with stand-ins for everything that it calls."""
    for name, body in STAND_INS.items():
        path = tmp_path / "venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return {
        "PATH": "/usr/bin:/bin", "SOLVUS_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"), "FAKE_NODES": " ".join(NODES), "FAKE_TRAP": "exit 130",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "4",
        "SOLVUS_ROOT": "/shared/runs", "RAY_AUTH_TOKEN": "of-another-cluster",
    }  # fmt: skip


def start(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """The script, running."""
    command = ["bash", str(SCRIPT), *(arguments or ("study=tiny",))]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(env: dict[str, str], *arguments: str) -> tuple[int, str, list[str]]:
    """The script to its end: status, output and what the stand-ins noted."""
    with start(env, *arguments) as process:
        output, _ = process.communicate(timeout=60)
    return process.returncode, output, calls(env)


def calls(env: dict[str, str]) -> list[str]:
    """What the stand-ins noted, so far."""
    path = Path(env["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def stop_when_running(process: subprocess.Popen[str], env: dict[str, str]) -> str:
    """SIGTERM once the study runs, as Slurm sends it before the time limit; the script's output."""
    end = time.monotonic() + 20
    while not any(line.startswith("auth") for line in calls(env)):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    return output


def assert_clean(env: dict[str, str], started: int) -> None:
    """Every node was ended, workers before the head, and the token is gone."""
    noted = calls(env)
    ended = [line for line in noted if line.startswith("stopped ray start")]
    assert len(ended) == started, noted
    assert "--head" in ended[-1] and not any("--head" in line for line in ended[:-1])
    assert noted[-1].startswith(("srun --nodes=3 --ntasks=3 --overlap rm -rf /tmp/ray-4711", "scontrol requeue"))
    assert not (Path(env["HOME"]) / ".solvus/slurm/4711/auth_token").exists()
    assert not any("ray stop" in line or "pkill" in line for line in noted)


def test_head_then_workers_then_the_study_then_nothing_is_left(cluster: dict[str, str]) -> None:
    cluster["SLURM_GPUS_ON_NODE"] = "2"
    status, output, noted = run(cluster, "study=tiny", "question=what is it?")
    assert status == 0, output
    task = "srun --nodes=1 --ntasks=1 --cpus-per-task=4 --overlap --nodelist="
    ray = "ray start --block --disable-usage-stats --num-cpus=4 --num-gpus=2 --temp-dir=/tmp/ray-4711"
    head = f"{task}n1 {ray} --head --node-ip-address=10.1.2.3 --port=24711 --dashboard-host=127.0.0.1"
    workers = [f"{task}{node} {ray} --address=10.1.2.3:24711" for node in NODES[1:]]
    study = (
        "solvus run executor.workers=6 executor.gpus=1 study=tiny question=what is it? executor=ray "
        "executor.address=10.1.2.3:24711"
    )
    assert noted[0] == "scontrol show hostnames n[1-3]"
    assert noted[2] == head
    assert sorted(noted[3:5]) == workers
    assert noted[5] == study
    # A token for this job alone, which only its owner reads; one from outside would win over it.
    mode, rights, token, *other = noted[6].split()[1:]
    assert (mode, rights, other) == ("token", "600", [])
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert token not in output
    assert_clean(cluster, started=3)


def test_a_second_turn_has_another_token_and_the_same_command(cluster: dict[str, str]) -> None:
    cluster["FAKE_STATUS"] = "3"
    turns = []
    for _ in range(2):
        status, _, noted = run(cluster)
        assert status == 3, "the study's own status"
        turns.append([line for line in noted if line.startswith(("solvus", "auth"))])
        Path(cluster["CALLS"]).unlink()
    assert (
        turns[0][0]
        == turns[1][0]
        == ("solvus run executor.workers=12 study=tiny executor=ray executor.address=10.1.2.3:24711")
    )
    assert turns[0][1] != turns[1][1]


def test_sigterm_reaches_the_study_and_its_status_comes_out(cluster: dict[str, str]) -> None:
    cluster |= {"FAKE_TICKS": "400", "FAKE_TRAP": 'echo graceful >> "$CALLS"; sleep 0.3; exit 130'}
    with start(cluster) as process:
        output = stop_when_running(process, cluster)
    assert process.returncode == 130, output
    noted = calls(cluster)
    assert noted.index("graceful") < min(i for i, line in enumerate(noted) if line.startswith("stopped"))
    assert_clean(cluster, started=3)
    assert not any("requeue" in line for line in noted)


def test_a_study_that_does_not_stop_is_killed_after_its_grace(cluster: dict[str, str]) -> None:
    cluster |= {"FAKE_TICKS": "400", "FAKE_TRAP": "", "SOLVUS_GRACE_S": "1"}
    with start(cluster) as process:
        before = time.monotonic()
        output = stop_when_running(process, cluster)
    assert process.returncode == 137, output
    assert time.monotonic() - before < 15
    assert_clean(cluster, started=3)


@pytest.mark.parametrize(("left", "again"), [(50, True), (5000, False)])
def test_another_turn_is_asked_for_at_the_time_limit_only(cluster: dict[str, str], left: int, again: bool) -> None:
    end = str(int(time.time()) + left)
    cluster |= {"FAKE_TICKS": "400", "SOLVUS_REQUEUE": "1", "SLURM_JOB_END_TIME": end}
    with start(cluster) as process:
        stop_when_running(process, cluster)
    assert process.returncode == 130
    assert (calls(cluster)[-1] == "scontrol requeue 4711") == again
    assert_clean(cluster, started=3)


def test_a_node_that_does_not_join_fails_the_job_in_bounded_time(cluster: dict[str, str]) -> None:
    cluster |= {"FAKE_JOINED": "n1 n2", "SOLVUS_JOIN_S": "1"}
    status, output, noted = run(cluster)
    assert status == 1 and "joining of all nodes did not happen within 1 s" in output
    assert not any(line.startswith("solvus") for line in noted)
    assert_clean(cluster, started=3)


def test_a_head_that_dies_is_seen_at_once(cluster: dict[str, str]) -> None:
    (Path(cluster["SOLVUS_VENV"]) / "bin" / "ray").write_text("#!/bin/bash\nexit 5\n")
    before = time.monotonic()
    status, output, noted = run(cluster)
    assert status == 1 and "a Ray node ended" in output
    assert time.monotonic() - before < 20
    assert not any(line.startswith("solvus") for line in noted)


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({"SOLVUS_ROOT": ""}, [], "no root"),
        ({"SOLVUS_ROOT": "runs"}, [], "'runs' is relative"),
        ({}, ["study=tiny", "root=runs"], "'runs' is relative"),
        ({"SLURM_JOB_ID": ""}, [], "no allocation"),
        ({"SOLVUS_VENV": "/nowhere"}, [], "is not on PATH"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    cluster: dict[str, str], change: dict[str, str], arguments: list[str], said: str
) -> None:
    status, output, noted = run(cluster | change, *arguments)
    assert (status, noted) == (2, [])
    assert said in output


def test_a_root_of_the_command_line_is_enough(cluster: dict[str, str]) -> None:
    cluster["SOLVUS_ROOT"] = ""
    status, output, _ = run(cluster, "study=tiny", "root=s3://bucket/runs")
    assert status == 0, output


def test_slurm_is_told_to_warn_and_to_requeue() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.M)
    assert {"--signal=B:TERM@60", "--requeue", "--exclusive", "--ntasks-per-node=1", "--open-mode=append"} <= set(
        options
    )
