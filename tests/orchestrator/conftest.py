"""What the tests of the plumbing share: a small exact recipe, small studies, and one launch of one."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.executors.local import LocalExecutor
from orchestrator.ledger import Ledger
from orchestrator.loop import run
from orchestrator.progress import Progress
from orchestrator.store import Store
from orchestrator.study import Study
from tasks import run as tasks_run
from tasks.recipe import Recipe
from tasks.registry import metrics as metric_registry


class ListTracker:
    """The in-memory twin of a tracker."""

    def __init__(self) -> None:
        self.trials: list[Any] = []

    def log(self, trial: Any) -> None:
        self.trials.append(trial)

    def close(self, state: str, summary: Any, artifacts: list[Path]) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def _no_root_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOLVUS_ROOT", raising=False)


@pytest.fixture(scope="session")
def gmm() -> Recipe:
    """Four DDIM steps on an exact mixture, 16 rows a batch."""
    recipe = Recipe("gmm", "ddim", "uniform", "none", "single", batch_size=16).completed()  # type: ignore[arg-type]
    return recipe.override({"times.num_steps": 4})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "root")


@pytest.fixture
def make_study(tmp_path: Path, gmm: Recipe) -> Callable[..., Study]:
    """A function that makes a small study; keyword arguments replace its fields."""

    def make(**changes: Any) -> Study:
        metrics = changes.pop("metrics", [{"name": "mean_reward", "reward": "ink"}])
        fields: dict[str, Any] = {
            "name": "small",
            "recipe": gmm,
            "metrics": [metric_registry.complete(spec) for spec in [*metrics, "cost"]],
            "search": {"name": "single"},
            "num_samples": 32,
            "shard_size": 16,
            "root": str(tmp_path / "root"),
        }
        return Study(**(fields | changes))

    return make


@pytest.fixture
def launch() -> Callable[..., SimpleNamespace]:
    """A function that runs a study here and returns its trials, tracker, watch, ledger and store."""

    def start(study: Study, executor: Any = None) -> SimpleNamespace:
        tracker, watch, ledger, store = ListTracker(), Progress(stream=io.StringIO()), Ledger(), Store(study.root)
        trials: list[Any] = []
        run(study, executor or LocalExecutor(), store, tracker, watch, ledger, trials)
        return SimpleNamespace(trials=trials, tracker=tracker, watch=watch, ledger=ledger, store=store)

    return start


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """(recipe key, start, stop) of every call of ``generate``, in order."""
    calls: list[tuple[str, int, int]] = []
    original = tasks_run.generate

    def counted(recipe: Recipe, start: int, stop: int, *rest: Any, **more: Any) -> Any:
        calls.append((recipe.key, start, stop))
        return original(recipe, start, stop, *rest, **more)

    monkeypatch.setattr(tasks_run, "generate", counted)
    yield calls


@pytest.fixture
def solvus(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """A function that calls the command line here: exit status, standard output, standard error, JSON if asked for."""

    def call(*argv: str) -> SimpleNamespace:
        capsys.readouterr()
        handlers, level = logging.root.handlers[:], logging.root.level
        logging.root.handlers.clear()  # or the command line would close those of the test run
        try:
            code = cli.main(list(argv))
        except SystemExit as ended:
            code = ended.code  # type: ignore[assignment]
        finally:
            logging.root.handlers[:], logging.root.level = handlers, level
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, data=json.loads(out) if "--json" in argv and out else None)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished small study ``tiny`` (two solvers at two costs); only to be read."""
    root = tmp_path_factory.mktemp("finished")
    space = "{solver:[ddim,heun],nfe:[3,5]}"
    code = cli.main(
        ["run", "study=tiny", f"search.space={space}", "num_samples=64", "batch_size=32", "shard_size=32",
         "tracker=none", f"root={root}"]
    )  # fmt: skip
    assert code == 0
    return root
