"""The commit beside the rows is that of this code, marked where it was changed, and known where it travels."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import origin
from orchestrator.adapters import ray_jobs

SCRIPT = "from orchestrator.origin import commit; print(commit())"


def told(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "."} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository in which the module is tracked, beside one line of another file."""
    (tmp_path / "orchestrator").mkdir()
    shutil.copy(origin.__file__, tmp_path / "orchestrator" / "origin.py")
    (tmp_path / "orchestrator" / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "orchestrator/origin.py", "orchestrator/__init__.py")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def test_a_changed_tree_is_not_taken_for_its_commit(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    (repository / ".gitignore").write_text("__pycache__\n")
    git(repository, "add", ".gitignore")
    git(repository, "commit", "-qm", "y")
    assert told(repository) == git(repository, "rev-parse", "HEAD") != head
    (repository / "orchestrator" / "__init__.py").write_text("changed = True\n")
    assert told(repository) == git(repository, "rev-parse", "HEAD") + "+changes"


def test_a_copy_in_a_repository_of_somebody_else_has_no_commit(repository: Path) -> None:
    copy = repository / "venv" / "orchestrator"
    shutil.copytree(repository / "orchestrator", copy)
    assert told(copy.parent) == ""
    assert told(copy.parent, SOLVUS_COMMIT="abc") == "abc"


def test_a_job_is_told_the_commit_that_its_packages_have_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "commit", lambda: "abc+changes")
    assert ray_jobs._environment()["SOLVUS_COMMIT"] == "abc+changes"
