"""Which code and machine make rows: recorded beside them, never part of a key."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

COMMIT = "SOLVUS_COMMIT"  # says the commit where the code travels without its repository


@lru_cache(maxsize=1)
def origin() -> dict[str, Any]:
    """Commit, machine and versions of packages."""
    versions = {}
    for package in ("solvus", "torch", "diffusers", "numpy", "pyarrow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"commit": commit(), "machine": f"{platform.machine()}/{platform.node()}", "versions": versions}


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of this code, with the mark "+changes" where the tree differs from it; empty where nobody knows."""
    if found := os.environ.get(COMMIT):
        return found
    # An installed copy may lie in somebody else's repository.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None or (head := _git("rev-parse", "HEAD")) is None:
        return ""
    return head + ("+changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str | None:
    """What git says here; None where it refuses or is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
