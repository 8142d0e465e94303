"""``solvus submit`` on a real Ray cluster with token authentication."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.ray_cluster import RayCluster
from orchestrator.results import Results

pytestmark = pytest.mark.ray

STUDY = [
    "study=tiny",
    "search=single",
    "num_samples=64",
    "batch_size=32",
    "shard_size=32",
    "nfe=4",
    "tracker=none",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    # Ray's socket paths must stay short.
    head = RayCluster(Path(f"/tmp/solvus-ray-{os.getpid()}"), num_cpus=2, dashboard=True)
    yield head
    head.close()


def submit(
    cluster: RayCluster, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "submit", *arguments, "--address", cluster.jobs],
        env=cluster.environment if environment is None else environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_submit_runs_the_study_follows_its_log_and_refuses_or_attaches_to_a_duplicate(
    cluster: RayCluster, tmp_path: Path
) -> None:
    # Its worker needs more CPUs than the head has, so it runs until a node is added.
    executor = ["executor=ray", "executor.address=auto", "executor.workers=1", "executor.cpus=3"]
    arguments = [*STUDY, "name=sent", f"root={tmp_path}", *executor]
    first = submit(cluster, *arguments, "--no-wait", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["state"] == "submitted"
    duplicate = submit(cluster, *arguments)
    assert duplicate.returncode == 2 and "already runs" in duplicate.stderr and "--attach" in duplicate.stderr
    cluster.add_node(num_cpus=3)
    attached = submit(cluster, *arguments, "--attach", "--json")
    assert attached.returncode == 0, (attached.stdout, attached.stderr)
    assert json.loads(attached.stdout.splitlines()[-1])["state"] == "succeeded"
    assert "samples made" in attached.stderr
    assert Results(str(tmp_path), "sent").state()["state"] == "complete"
    # The same name again after the end is a new job that resumes, and finds everything done.
    again = submit(cluster, *arguments, "--json")
    assert again.returncode == 0, again.stderr
    assert Results(str(tmp_path), "sent").state()["summary"]["samples_made"] == 0


def test_a_failing_study_passes_its_exit_status_on(cluster: RayCluster, tmp_path: Path) -> None:
    # A store of another format version is refused on the cluster, with exit status 2.
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "FORMAT.json").write_text('{"format": 999}')
    done = submit(cluster, *STUDY, "name=refused", f"root={tmp_path}")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "store format 999" in done.stderr


def test_a_job_without_the_token_is_refused(cluster: RayCluster, tmp_path: Path) -> None:
    assert cluster.get("/api/jobs/", None)[0] == 401
    assert cluster.get("/api/jobs/", "wrong" * 8)[0] in (401, 403)
    bare = {k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH")}
    bare["HOME"] = str(tmp_path)
    done = submit(cluster, *STUDY, "name=stranger", f"root={tmp_path}", environment=bare)
    assert done.returncode == 2 and "token" in done.stderr.lower(), done.stderr
    assert "Traceback" not in done.stderr


def test_a_relative_root_is_refused(cluster: RayCluster) -> None:
    done = submit(cluster, *STUDY, "name=lost", "root=somewhere")
    assert done.returncode == 2 and "relative" in done.stderr


def test_a_password_does_not_travel(cluster: RayCluster, tmp_path: Path) -> None:
    secret = "storage=postgresql://me:hunter2@db/x"
    done = submit(cluster, *STUDY, "name=secret", f"root={tmp_path}", secret)
    assert done.returncode == 2 and "password" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
