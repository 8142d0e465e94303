"""Every command and code block of README and docs: executed, or named here with the reason why not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli, config
from tasks import registry

Solvus = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PAGES = [ROOT / name for name in TOP] + sorted((ROOT / "docs").rglob("*.md"))

# What a documentation test cannot run, by what the command begins with or holds, and why.
OTHER_PROGRAMS = {
    "python": "a benchmark, which measures for minutes",
    "make": "sets the machine up; continuous integration runs every target",
    "docker": "needs Docker; tests/cluster checks the files",
    "kubectl": "needs Kubernetes; tests/cluster checks the files",
    "prometheus": "serves until it is stopped",
    "helm": "needs Kubernetes", "sbatch": "needs Slurm; tests/cluster runs the script with a stand-in",
    "ray": "needs a cloud account", "aws": "needs a cloud account", "gcloud": "needs a cloud account",
    "pip": "installs", "install": "writes into the home folder", "cp": "needs the settings of a cluster",
    "cluster/entrypoint.sh": "starts a cluster; tests/cluster runs it dry",
}  # fmt: skip
NOT_RUN = {
    "solvus submit": "needs a cluster; tests/orchestrator/test_submit.py submits to one",
    "solvus chaos": "takes minutes; tests/orchestrator/test_chaos.py injects the same faults",
    "solvus train": "takes minutes; tests/tasks trains each for a few steps",
    "solvus ui": "serves until it is stopped; tests/orchestrator/test_mlflow.py opens the pages",
    "--follow": "watches a study that runs; tests/orchestrator/test_follow.py follows one",
    "metrics_port": "opens a port for Prometheus; the tests of Prometheus read from one",
    "executor=ray": "needs a cluster of its own; tests/orchestrator/test_ray.py starts one",
    "cluster=": "starts Ray; tests/orchestrator/test_ray.py does",
    "study=tokens": "takes long; tests/orchestrator/test_token_space.py plans every trial of it",
    "FOLDER": "a folder of the reader's; tests/tasks and tests/orchestrator read small ones",
    "OWNER/NAME": "a model on the hub", "/data/": "weights of the reader's", ".pkl": "weights of the reader's",
    "executor=": "another executor",
    "=NAME": "a study of the reader's", " NAME": "a study of the reader's", " A ": "two studies of the reader's",
    "…": "says what may stand there",
}  # fmt: skip
# Sizes with which a documented study is run here: it must work, not tell anything.
SMALL = ["num_samples=80", "batch_size=80", "shard_size=80", "tracker=none", "executor=local"]


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and whether it uses the plug-ins of its page."""

    page: str
    line: int
    language: str
    text: str
    uses_plugins: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Commands of a shell block, with continued lines joined and comments gone."""
        text = re.sub(r"\\\n\s*", "", self.text)
        lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line]


def blocks(path: Path) -> Iterator[Block]:
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start()) + 1
        before = text[: found.start()].rstrip().endswith("<!-- plugin -->")
        yield Block(name, line, found[1], found[2], before)


BLOCKS = [block for path in PAGES for block in blocks(path)]
COMMANDS = [(block, command) for block in BLOCKS if block.language == "sh" for command in block.commands]
OURS = [(block, command) for block, command in COMMANDS if command.startswith("solvus ")]
RUN = [(block, command) for block, command in OURS if not any(part in f"{command} " for part in NOT_RUN)]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert len(BLOCKS) > 20
    assert {str(b): b.language for b in BLOCKS if b.language not in ("sh", "python", "yaml", "json", "text", "")} == {}
    plain = [b for b in BLOCKS if b.language in ("text", "")]
    assert [str(b) for b in plain if re.search(r"^\s*(\$ )?(solvus|import|python) ", b.text, re.MULTILINE)] == []


def test_every_command_is_run_or_says_why_not() -> None:
    def is_known(command: str) -> bool:
        words = command.split()
        if words[0] in ("export", "openssl") or re.match(r"\w+=", words[0]):
            return True  # settings of what follows
        return words[0] == "solvus" or words[0] in OTHER_PROGRAMS

    assert [f"{block}: {command}" for block, command in COMMANDS if not is_known(command)] == []
    used = {part for _, command in OURS for part in NOT_RUN if part in f"{command} "}
    assert len(RUN) > 25 and used <= set(NOT_RUN)


def test_every_command_has_verbs_and_options_that_exist() -> None:
    parser = cli.parser()
    for block, command in OURS:
        words = [word for word in shlex.split(command)[1:] if word not in ("…", "&")]
        try:
            args, rest = parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{block}: {command}")
        assert [word for word in rest if "=" not in word] == [], f"{block}: {command}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would stand: a schedule, prompts and a study of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOLVUS_ROOT", str(tmp_path / "runs"))
    schedule = {"times": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], "steps": [{"order": 1}, *({"order": 2} for _ in range(4))]}
    (tmp_path / "my.json").write_text(json.dumps(schedule))
    (tmp_path / "prompts.txt").write_text("a red cat\ntwo dogs\n")
    return tmp_path


@pytest.fixture
def plugins() -> Iterator[Callable[[Block], None]]:
    """A function that runs the Python of a block's page; what it registers is gone after the test."""
    kept = {name: dict(r._classes) for name, r in registry.ALL.items() if r.names() is not None}

    def load(block: Block) -> None:
        for other in BLOCKS:
            if other.page == block.page and other.language == "python":
                exec(compile(other.text, str(other), "exec"), {"__name__": __name__})

    yield load
    for name, classes in kept.items():
        registry.ALL[name]._classes = classes


def test_every_study_of_the_readme_composes(folder: Path) -> None:
    """Those of other pages are run below."""
    wrong = []
    for block, command in RUN:
        words = shlex.split(command)
        if block.page == "README.md" and words[1] in ("run", "plan"):
            args = cli.parser().parse_args(words[1:])
            try:
                config.study(config.compose(args.overrides, args.config_dir))
            except ValueError as error:
                wrong.append(f"{block}: {command}: {error}")
    assert wrong == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_a_documented_schedule_is_one(block: Block) -> None:
    from tasks.schedule import SolverSchedule

    assert SolverSchedule.from_json(block.text).nfe > 0


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_a_documented_study_file_composes(block: Block, folder: Path) -> None:
    if "/data/" in block.text:
        block = Block(block.page, block.line, "yaml", re.sub(r", path: /data/[\w./-]+", "", block.text))
    head = "" if "@package" in block.text else "# @package _global_\n"
    text = block.text.replace(", …}", "}")
    (folder / "study").mkdir()
    (folder / "study" / "documented.yaml").write_text(head + text)
    search = ["search=tpe", "search.objective=quality/frechet"] if "low:" in text else []
    metrics = [] if "metrics:" in text else ["metrics=[frechet]"]
    model = [] if "/model:" in text else ["model=digits"]
    if "guidance.scale" in text:
        model += ["guidance=cfg"]
    composed = config.compose([*model, "study=documented", *search, *metrics], [str(folder)])
    assert config.study(composed).config["metrics"]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_documented_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


# --- what takes longer: everything is really run ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block, _ in RUN))
def test_the_commands_of_a_page_run(page: str, folder: Path, solvus: Solvus, plugins: Callable[[Block], None]) -> None:
    """In order, in one folder, in small: what a page makes, its later commands find."""
    solvus("run", "study=tiny", *SMALL)
    failed = []
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.language == "json":
            (folder / "my.json").write_text(block.text)
        if block.language == "python" and page == "docs/howto/model.md":
            exec(compile(block.text, str(block), "exec"), {"__name__": __name__})
        if block.uses_plugins:
            plugins(block)
        for _, command in [pair for pair in RUN if pair[0] is block]:
            words = shlex.split(command)[1:]
            began = time.perf_counter()
            done = solvus(*words, *_sizes(words))
            print(f"{time.perf_counter() - began:6.1f} s  {command}", file=sys.__stderr__)
            if done.code != 0:
                failed.append(f"{block}: {command}: {done.code} {done.err[-300:]}")
            shutil.rmtree(folder / "my-solver", ignore_errors=True)
    assert failed == []


def _sizes(words: list[str]) -> list[str]:
    """Overrides that make a study small, whatever it searches."""
    if words[0] not in ("run", "plan", "export", "likelihood"):
        return []
    study = next((word.removeprefix("study=") for word in words if word.startswith("study=")), None)
    known = config.studies() if study else {}
    text = known[study].read_text() if study in known else " ".join(words)
    small = [size for size in SMALL if words[0] != "export" or size.startswith("batch")]
    if words[0] == "run" and re.search(r"num_trials|search[:=] ?(cmaes|tpe|turbo|least_squares|nsga2)", text):
        small += ["search.num_trials=2", "search.baselines=[]", "search.held_out=80", "search.refine=0"]
    if words[0] == "run" and study == "transfer":
        small += ["search.models=[digits]", "search.nfes=[5]", "search.num_samples=80"]
    return small


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_documented_python_runs(block: Block, folder: Path, solvus: Solvus) -> None:
    if 'open_study("quickstart")' in block.text and "run(" not in block.text:
        assert (
            solvus("run", "study=tiny", "model=digits_flow", "name=quickstart", *SMALL).code == 0
        )  # in small, what the reader has run
    done = subprocess.run(
        [sys.executable, "-c", block.text], capture_output=True, text=True, timeout=280, cwd=folder,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_without_a_warning_and_asks_nothing_of_any_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    loads = re.compile(r"<(?:script|img|iframe|link(?![^>]*canonical))[^>]*(?:src|href)=[\"']?(?:https?:)?//")
    assert len(pages) > 150 and [page.name for page in pages if loads.search(page.read_text())] == []
    for kind in ("solver/ddim", "strategy/fk_steering", "search/tpe", "cli"):
        assert (tmp_path / "site" / "reference" / kind / "index.html").is_file()
