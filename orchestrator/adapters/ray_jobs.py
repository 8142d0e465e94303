"""Submit a study to a Ray cluster as a job, follow its log, pass its exit status on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.origin import COMMIT, commit

log = logging.getLogger("solvus")
T = TypeVar("T")

PACKAGES = ("tasks", "orchestrator", "configs", "dashboards")
CONFIG_FILE = "submitted-study.json"
_ALIVE = ("PENDING", "RUNNING")


def submit(name: str, config: dict[str, Any], address: str | None, wait: bool, attach: bool, as_json: bool) -> int:
    """Send the study and this version of the code as a job whose id is the study's name.

    Args:
        name: the study's name.
        config: its frozen configuration; travels as a file, because quotes do not survive shells.
        address: the job server, ``http://HOST:8265``; None takes $RAY_API_SERVER_ADDRESS.
        wait: follow the log until the end.
        attach: follow a job of that name that runs already, instead of refusing.
        as_json: print one JSON object at the end.

    Returns:
        the study's exit status; 0 without waiting.

    Raises:
        ValueError: no address, no cluster there, no permission, or the study runs there already.
    """
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ValueError("submit needs a cluster: --address http://HOST:8265 or $RAY_API_SERVER_ADDRESS.")
    _use_token()
    client = _call(address, lambda: JobSubmissionClient(address))
    known = {job.submission_id: job for job in _call(address, client.list_jobs)}
    running = name in known and str(known[name].status) in _ALIVE
    if running and not attach:
        raise ValueError(f"study {name!r} already runs on {address}. Follow it with --attach, or choose another name.")
    if not running:
        if name in known:
            _call(address, lambda: client.delete_job(name))
        with tempfile.TemporaryDirectory() as folder:
            _stage(Path(folder), config)
            _call(
                address,
                lambda: client.submit_job(
                    entrypoint=f"python -m orchestrator.cli run --frozen {CONFIG_FILE}",
                    submission_id=name,
                    runtime_env={"working_dir": folder, "env_vars": _environment()},
                    metadata={"solvus.study": name},
                ),
            )
    if not wait:
        _say(as_json, {"study": name, "address": address, "state": "submitted"}, f"{name} submitted to {address}")
        return 0
    status, code = _follow(client, address, name)
    _say(
        as_json, {"study": name, "address": address, "state": status.lower(), "exit": code}, f"{name}: {status.lower()}"
    )
    return code


def _say(as_json: bool, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data) if as_json else text)


def _use_token() -> None:
    """With a token at hand, use it; Ray asks for the mode to be named."""
    default = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or default.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _call(address: str, function: Callable[[], T]) -> T:
    """Talk to the job server: wait while it is still starting, tell what it refuses in one sentence."""
    deadline = time.monotonic() + 120
    try:
        while True:
            try:
                return function()
            except RuntimeError as error:
                if "try again later" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(2)
    except (ConnectionError, RuntimeError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the Ray cluster at {address} refused: {text}") from None
    except Exception as error:  # Ray raises its authentication errors from classes that move between versions
        if "Authentication" not in type(error).__name__ and "token" not in str(error).lower():
            raise
        raise ValueError(
            f"the Ray cluster at {address} wants a token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE."
        ) from None


def _environment() -> dict[str, str]:
    """Variables of the job; the packages travel without their repository, so the commit is told."""
    return {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", COMMIT: commit()}


def _stage(folder: Path, config: dict[str, Any]) -> None:
    """The project's packages and the study's file: no history, no results, no environment."""
    root = Path(__file__).resolve().parent.parent.parent
    for package in PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def _follow(client: Any, address: str, name: str) -> tuple[str, int]:
    """Print the job's log as it grows; outlast a job server that is away for a while."""
    printed, silent_since = 0, time.monotonic()
    while True:
        try:
            info = client.get_job_info(name)
            text = client.get_job_logs(name)
            silent_since = time.monotonic()
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() - silent_since > 300:
                raise ValueError(
                    f"the Ray cluster at {address} has been silent for five minutes: {error}. The study may be "
                    "running; submit it again with --attach."
                ) from None
            time.sleep(2)
            continue
        sys.stderr.write(text[printed:])
        sys.stderr.flush()
        printed = len(text)
        status = str(info.status)
        if status not in _ALIVE:
            code = getattr(info, "driver_exit_code", None)
            return status, 0 if status == "SUCCEEDED" else (code if code else 1)
        time.sleep(1)
