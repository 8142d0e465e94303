"""Disks that fill up, replies that get lost, weights that move, garbage that stays behind."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.files import LocalFiles, Patient
from orchestrator.plan import shards
from orchestrator.ports import Proposal
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.worker import perform
from tasks.checkpoint import WEIGHTS
from tasks.recipe import Recipe

Solvus = Callable[..., SimpleNamespace]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_fills_up_in_mid_write_fails_clearly_and_leaves_nothing_half_written(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    argv = ["run", "model=gmm", "name=full", "num_samples=96", "batch_size=16", "shard_size=16", "tracker=none",
            f"root={tmp_path}"]  # fmt: skip
    sync, calls = os.fsync, {"n": 0}

    def failing(descriptor: int) -> None:
        calls["n"] += 1
        if calls["n"] >= 8:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match=words):  # the table of trials cannot be written either
            solvus(*argv)
    store = Store(tmp_path)
    assert store.verify()[1] == []
    assert not list(tmp_path.rglob(".tmp-*"))
    done = solvus(*argv, "--json")
    assert done.code == 0 and 0 < done.data["samples_made"] < 96


def test_a_place_that_is_away_is_waited_for_but_a_full_disk_is_not(tmp_path: Path) -> None:
    class Flaky(LocalFiles):
        errors: list[OSError] = []

        def write(self, name: str, data: bytes) -> None:
            if self.errors:
                raise self.errors.pop(0)
            super().write(name, data)

    files = Flaky(tmp_path)
    files.errors = [OSError("connection reset"), OSError(errno.ETIMEDOUT, "timed out")]
    began = time.monotonic()
    Patient(files, patience_s=30).write("a", b"x")
    assert files.read("a") == b"x" and time.monotonic() - began > 1
    files.errors = [OSError(errno.ENOSPC, "full")]
    with pytest.raises(OSError, match="full"):
        Patient(files, patience_s=30).write("b", b"x")
    files.errors = [OSError("gone")] * 99
    with pytest.raises(OSError, match="gone"):
        Patient(files, patience_s=1).write("c", b"x")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_reply_that_was_lost_after_its_commit_makes_no_second_run(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    original, lost = mlflow.MlflowClient.create_run, {"left": 2}

    def forgetful(self: Any, *arguments: Any, **options: Any) -> Any:
        run = original(self, *arguments, **options)
        if "solvus.trial" in (options.get("tags") or {}) and lost["left"]:
            lost["left"] -= 1
            raise ConnectionError("the reply was lost")
        return run

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", forgetful)
    argv = ["run", "study=tiny", "num_samples=64", "batch_size=32", "search.space={nfe:[3,5]}", f"root={tmp_path}"]
    argv += ["metrics=[{name:frechet,features:identity}]"]
    assert solvus(*argv).code == 0 and lost["left"] == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "solvus.trial" in r.data.tags]
    assert len(runs) == 2 and {r.info.status for r in runs} == {"FINISHED"}


def test_weights_that_move_in_mid_study_are_refused(tmp_path: Path, make_study: Callable[..., Study]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS / "digits", folder)
    recipe = Recipe({"name": "digits", "path": str(folder)}, {"name": "ddim"}, {"name": "uniform", "num_steps": 2},
                    {"name": "none"}, {"name": "single"}, batch_size=4)  # fmt: skip
    study = make_study(recipe=recipe.completed(), metrics=[])
    study.context()
    (planned,) = shards(study.trial(0, Proposal({})).recipe, [], 0, 4, 4, Store(study.root))
    shutil.copy(WEIGHTS / "digits_flow" / "unet" / "diffusion_pytorch_model.safetensors",
                folder / "unet" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="changed while the study ran"):
        study.trial(1, Proposal({"times.num_steps": 3}))
    # A worker that was handed the old plan refuses too.
    with pytest.raises(ValueError, match="weights changed"):
        perform(planned)


def test_garbage_goes_and_what_counts_stays(
    make_study: Callable[..., Study], launch: Callable[..., SimpleNamespace], solvus: Solvus
) -> None:
    study = make_study()
    launch(study)
    store = Store(study.root)
    folder = Path(study.root) / "store" / store.folder("rows", study.recipe.key)
    (folder / "0000000000-0000000016.deadbeef.parquet").write_bytes(b"an orphan")
    (folder / ".tmp-1234").write_bytes(b"half")
    kept = {path.name for path in folder.iterdir()}
    assert solvus("gc", f"root={study.root}", "--json").data["files"] == 0  # too young
    dry = solvus("gc", f"root={study.root}", "--older-than-s", "0", "--dry-run", "--json").data
    assert (dry["files"], dry["bytes"]) == (2, 13) and {path.name for path in folder.iterdir()} == kept
    assert solvus("gc", f"root={study.root}", "--older-than-s", "0", "--json").data["files"] == 2
    assert len(list(folder.iterdir())) == len(kept) - 2
    assert store.verify()[1] == [] and launch(study).watch.samples == 0


def test_a_locked_search_storage_is_waited_for(tmp_path: Path) -> None:
    from orchestrator.adapters.optuna_search.storage import patiently as _patiently

    class OperationalError(Exception):
        """As SQLAlchemy names it."""

    failures = [OperationalError("database is locked"), OperationalError("server closed the connection")]

    def call() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    assert _patiently(call) == "done"
    with pytest.raises(ZeroDivisionError):
        _patiently(lambda: 1 / 0)
