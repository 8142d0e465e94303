"""Arrows point one way, and heavy guests stay in their rooms: a walk over the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tasks.registry import ALL

ROOT = Path(__file__).resolve().parents[2]
PLUMBING = {"orchestrator", "dashboards", "ray", "mlflow", "optuna", "optuna_dashboard", "hydra", "omegaconf"}
FOLDERS = {package for registry in ALL.values() for package in registry.packages}
PLUGINS = sorted(
    package.removeprefix("tasks.").replace(".", "/") for package in FOLDERS if package.startswith("tasks.")
)
PLUGINS += ["pipelines/families"]


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, also inside functions: ``from a import b`` gives ``a.b``."""
    return frozenset(_walk(path))


def _walk(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def importers(top: str, *folders: str) -> set[str]:
    """Files that import a top-level package."""
    return {name(path) for path in modules(*folders) if any(i.split(".")[0] == top for i in imported(path))}


def test_the_walk_sees_imports_inside_functions_and_relative_ones(tmp_path: Path) -> None:
    assert "orchestrator/adapters/ray_executor.py" in importers("ray", "orchestrator")
    assert "tasks.registry.solvers" in imported(ROOT / "tasks" / "solvers" / "heun.py")
    assert len(modules("tasks")) > 30 and len(modules("orchestrator")) > 15


@pytest.mark.parametrize("guest", sorted(PLUMBING))
def test_the_science_knows_nothing_of_the_plumbing(guest: str) -> None:
    assert importers(guest, "tasks") == set()


@pytest.mark.parametrize("guest", ["ray", "mlflow", "optuna", "optuna_dashboard", "boto3", "botocore"])
def test_services_are_imported_only_by_adapters(guest: str) -> None:
    outside = {path for path in importers(guest, "tasks", "orchestrator", "dashboards", "configs")}
    assert {path for path in outside if not path.startswith("orchestrator/adapters/")} == set()


def test_hydra_is_imported_only_by_the_configuration() -> None:
    assert importers("hydra", "tasks", "orchestrator", "dashboards", "configs") == {"orchestrator/config.py"}


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_plug_in_imports_no_other_plug_in(kind: str) -> None:
    files = {
        f"tasks.{k.replace('/', '.')}.{path.stem}"
        for k in PLUGINS
        for path in modules(f"tasks/{k}")
        if path.stem != "__init__"
    }
    own = [path for path in modules(f"tasks/{kind}") if path.stem != "__init__"]
    assert own
    found = {
        (name(path), other)
        for path in own
        for other in files - {f"tasks.{kind.replace('/', '.')}.{path.stem}"}
        for i in imported(path)
        if i == other or i.startswith(f"{other}.")
    }
    assert found == set()


def test_a_search_an_executor_or_a_tracker_is_imported_by_its_registry_alone() -> None:
    files = {f"orchestrator.{k}.{p.stem}" for k in ("executors", "trackers") for p in modules(f"orchestrator/{k}")}
    for path in modules("orchestrator", "dashboards"):
        used = {i for i in imported(path) for other in files if i == other or i.startswith(f"{other}.")}
        assert used == set(), name(path)


def test_arrows_inside_the_plumbing_point_away_from_the_command_line() -> None:
    order = ["store", "plan", "measure", "trial", "study", "loop", "config", "launch", "api", "cli"]
    for position, module in enumerate(order[:-1]):
        later = {f"orchestrator.{other}" for other in order[position + 1 :]}
        used = {".".join(i.split(".")[:2]) for i in imported(ROOT / "orchestrator" / f"{module}.py")}
        assert used & later == set(), module


def test_verbs_are_known_to_the_command_line_alone_and_reports_to_what_people_call() -> None:
    for path in modules("orchestrator"):
        where, used = name(path), imported(path)
        is_verb = where.startswith("orchestrator/verbs/")
        if not is_verb and where != "orchestrator/cli.py":
            assert not any(i.startswith("orchestrator.verbs") for i in used), where
        if not is_verb and where != "orchestrator/api.py":
            assert not any(i.split(".")[0] == "dashboards" for i in used), where


def test_dashboards_read_the_store_and_never_run_a_study() -> None:
    used = {i for path in modules("dashboards") for i in imported(path)}
    for forbidden in (
        "orchestrator.study",
        "orchestrator.loop",
        "orchestrator.verbs",
        "orchestrator.cli",
        "orchestrator.worker",
        "tasks.run",
    ):
        assert not any(i == forbidden or i.startswith(f"{forbidden}.") for i in used), forbidden
