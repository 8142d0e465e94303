"""What nobody gets in by: names, pickles, callables, HTML, passwords."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.redact import redact, redact_all
from orchestrator.store import Store
from tasks.checkpoint import WEIGHTS

Solvus = Callable[..., SimpleNamespace]


class Bomb:
    """Leaves a mark when somebody unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "override",
    [
        "model._target_=os.system",
        "solver={_target_:subprocess.run,args:[id]}",
        "+solver._target_=builtins.eval",
        "metrics=[{_target_:os.system}]",
        "search.parts=[{_target_:os.system}]",
        "+executor.pools={score:{_target_:os.system}}",
    ],
)
def test_a_configuration_cannot_name_a_callable(solvus: Solvus, tmp_path: Path, override: str) -> None:
    done = solvus("run", "tracker=none", f"root={tmp_path}", override)
    assert done.code == 2 and "Traceback" not in done.err


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_never_opened(
    solvus: Solvus, tmp_path: Path, file: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS / "digits", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / file).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    done = solvus("run", "model=unet", f"model.path={folder}", "nfe=2", "num_samples=4", "batch_size=4", "tracker=none",
                  f"root={tmp_path / 'root'}")  # fmt: skip
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_place_of_an_artifact_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = "ab" + "0" * 30
    for name in (f"references/ab/{key}.safetensors", f"values/ab/{key}.json"):
        store.files.write(name, pickle.dumps(Bomb(tmp_path / "mark")))
    assert store.get_arrays("references", key) is None
    assert store.get_json("values", key) is None
    assert len(store.verify()[1]) == 2
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "..", "a\nb", "a\x00b", "a b", "-a", "'é'", "$HOME"])
def test_names_that_are_no_plain_words_never_become_paths(solvus: Solvus, tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep" / "root"
    done = solvus("run", "num_samples=4", "tracker=none", f"root={root}", f"name={name}")
    assert done.code == 2, done.out
    assert [path for path in tmp_path.rglob("*") if path.name not in ("deep", "root", "store", "FORMAT.json")] == []


@pytest.mark.parametrize("key", ["../../etc/passwd/0-1", "..%2f/0-1", "a/b/c/0-1", "/0-1", "ab*/0-1"])
def test_a_shard_name_cannot_leave_the_store(solvus: Solvus, tmp_path: Path, key: str) -> None:
    done = solvus("shard", key, f"root={tmp_path}")
    assert done.code == 2 and "Traceback" not in done.err


def test_a_label_question_or_reason_is_escaped_in_the_report(solvus: Solvus, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    argv = ["model=gmm", "num_samples=8", "batch_size=8", "tracker=none", f"root={tmp_path}", f"question='{evil}'"]
    assert solvus("run", *argv).code == 0
    page = (tmp_path / "studies" / "adhoc" / "report.html").read_text()
    assert evil not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("postgresql://me:hunter2@db:5432/x", "postgresql://me:***@db:5432/x"),
        ("a postgresql+psycopg://me:p@ss:w0rd@db/x b", "a postgresql+psycopg://me:***@db/x b"),
        ("https://host/path?token=hunter2&x=1", "https://host/path?token=***&x=1"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("time 12:30@noon", "time 12:30@noon"),
    ],
)
def test_passwords_in_urls_are_redacted_and_nothing_else_is(text: str, safe: str) -> None:
    assert redact(text) == safe
    assert redact_all({"a": [text], "b": 3}) == {"a": [safe], "b": 3}


def test_services_bind_to_loopback() -> None:
    import inspect

    from orchestrator.adapters import pages, ray_cluster

    assert inspect.getsource(pages).count('"127.0.0.1"') == 2
    assert "0.0.0.0" not in inspect.getsource(pages) + inspect.getsource(ray_cluster)
