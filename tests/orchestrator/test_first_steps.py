"""First steps: a study to edit, completion by the shell, what the doctor says to do, and names that are mistyped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli, doctor
from orchestrator.completion import SCRIPTS, candidates, plugins
from orchestrator.registries import EVERY

Solvus = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
VERBS = cli.verbs_of(cli.parser())


def test_init_writes_a_study_that_runs_as_it_is(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = solvus("init", "mine", "--model", "gmm", "--json")
    assert made.code == 0 and Path(made.data["file"]).resolve() == tmp_path / "study" / "mine.yaml"
    command = made.data["run"].split()[1:]
    small = ["num_samples=8", "batch_size=8", "search.space={nfe:[1]}", "metrics=[]", "tracker=none"]
    done = solvus(*command, *small, "--json")
    assert (done.code, done.data["study"], done.data["trials"]) == (0, "mine", 1)
    assert solvus("status", "study=mine", "--json").data[0]["state"] == "complete", "named by its results alone"


def test_everything_that_the_first_study_offers_can_be_switched_on(solvus: Solvus, tmp_path: Path) -> None:
    solvus("init", "mine", "--dir", str(tmp_path))
    path = tmp_path / "study" / "mine.yaml"
    text = path.read_text().replace("    # guidance", "    guidance").replace("    # strategy", "    strategy")
    path.write_text(text.replace("# price_per", "price_per").replace("/search: grid", "/search: tpe"))
    argv = ["study=mine", "--config-dir", str(tmp_path), "guidance=cfg", "search.objective=quality/frechet"]
    done = solvus("run", *argv, "--cfg", "--json")
    assert done.code == 0, done.err
    assert {"solver", "nfe", "guidance.scale", "strategy.n"} == set(done.data["search"]["space"])
    assert done.data["price_per_device_hour"] == 2.5


def test_a_study_that_is_no_yaml_is_told_with_its_line(solvus: Solvus, tmp_path: Path) -> None:
    solvus("init", "mine", "--dir", str(tmp_path))
    path = tmp_path / "study" / "mine.yaml"
    path.write_text(path.read_text() + "  broken: {\n")
    done = solvus("plan", "study=mine", "--config-dir", str(tmp_path))
    assert done.code == 2 and "mine.yaml" in done.err and "line" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["init", "tiny"], "study 'tiny' comes with Solvus"),
        (["init", "a b"], "name becomes a folder"),
        (["init", "mine", "--model", "digitz"], "unknown model 'digitz', did you mean 'digits'?"),
        (["init", "mine"], "is there already"),
        (["init", "other", "--dir", "study/mine.yaml"], "cannot be written"),
    ],
)
def test_init_refuses_what_it_cannot_write(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert solvus("init", "mine").code == 0
    before = (tmp_path / "study" / "mine.yaml").read_text()
    done = solvus(*argv)
    assert done.code == 2 and message in done.err
    assert [path.name for path in tmp_path.rglob("*.yaml")] == ["mine.yaml"]
    assert (tmp_path / "study" / "mine.yaml").read_text() == before


@pytest.mark.parametrize("kind", EVERY)
def test_completion_reads_the_same_plug_ins_and_fields_as_the_registry(kind: str) -> None:
    registry = EVERY[kind]
    assert plugins(kind) == {name: [f.name for f in fields(registry.get(name))] for name in registry.names()}


def test_completion_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator import cli; cli.main(['completion', 'zsh', '--line', 'solvus run solver=dd']);"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'hydra', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["solver=ddim", "[]"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("solvus ru", ["run"]),
        ("solvus --", ["--help", "--version"]),
        ("solvus run solver=dpm_", ["solver=dpm_solver_v3"]),
        ("solvus run solver=heun solver.", ["solver.leading_euler_steps="]),
        ("solvus run times.rh", ["times.rho="]),
        ("solvus run study=qu", ["study=quickstart"]),
        ("solvus plan num_s", ["num_samples="]),
        ("solvus run 'solver=hea", []),
        ("solvus run 'solver=heu", ["solver=heun"]),
        ("solvus gc --d", ["--dry-run"]),
        ("solvus list met", ["metric"]),
        ("solvus show heu", ["heun"]),
        ("solvus completion f", ["fish"]),
        ("solvus nonsense x", []),
        ("solvus run solver=nonsense solver.rtol", ["solver.rtol="]),
    ],
)
def test_completion_offers(line: str, found: list[str]) -> None:
    assert candidates(line, VERBS) == found


def test_completion_knows_studies_of_a_folder_and_of_a_root(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.yaml").touch()
    assert candidates(f"solvus run --config-dir {tmp_path} study=mi", VERBS) == ["study=mine"]
    assert candidates(f"solvus figure root={finished} ti", VERBS) == ["times=", "tiny"]
    assert candidates(f"solvus report root={finished} name=t", VERBS) == ["name=tiny"]


def test_bash_completes_with_the_script() -> None:
    """A real bash, whose words end at '=': it must get what follows."""
    script = f"""
solvus() {{ {sys.executable} -m orchestrator.cli "$@"; }}
{SCRIPTS["bash"]}
compopt() {{ echo compopt "$@"; }}
try() {{ COMP_LINE=$1; COMP_POINT=${{#1}}; COMPREPLY=(); _solvus; printf '%s|' "${{COMPREPLY[@]}}"; echo; }}
try 'solvus run solver=hea'
try 'solvus run solver=heu'
try 'solvus run solver=heun solver.lead'
complete -p solvus
"""
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "|", "heun|", "compopt -o nospace", "solver.leading_euler_steps=|", "complete -o default -F _solvus solvus",
    ], done.stderr  # fmt: skip


@pytest.mark.parametrize("shell", SCRIPTS)
def test_every_script_asks_for_its_own_shell_and_says_how_to_keep_it(solvus: Solvus, shell: str) -> None:
    told = solvus("completion", shell)
    assert (
        told.code == 0
        and f"solvus completion {shell} --line" in told.out
        and f"To have it in every {shell}" in told.out
    )
    if shell == "zsh":
        assert told.out.startswith("#compdef solvus\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_script_is_one_that_the_shell_can_read(shell: str) -> None:
    from shutil import which

    if which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    done = subprocess.run([shell, "-n", "-c", SCRIPTS[shell]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_doctor_ends_with_what_to_do() -> None:
    fine = {"what": "torch", "found": "2", "ok": True, "needed": True, "fix": "pip install torch"}
    broken = fine | {"what": "numpy", "ok": False, "fix": "pip install numpy, or make setup"}
    optional = broken | {"what": "ray", "needed": False, "fix": "use executor=local"}
    assert "  solvus run study=tiny" in "\n".join(doctor.what_to_do([fine]))
    told = doctor.what_to_do([fine, optional, broken])
    assert told[0] == "1 needed thing(s) missing. What to do:"
    assert told[1] == "  numpy: pip install numpy, or make setup"
    assert told[-1] == "  ray: use executor=local" and not any("study=tiny" in line for line in told)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rnu", "study=tiny"], "unknown verb 'rnu', did you mean 'run'?"),
        (["solver=ddim"], "a verb comes first: solvus run solver=ddim"),
        (["run", "--frozn", "x=1"], "unknown option '--frozn', did you mean '--frozen'?"),
        (["run", "study=quikstart"], "unknown study 'quikstart', did you mean 'quickstart'?"),
        (["run", "solvr=ddim"], "unknown key 'solvr', did you mean 'solver'?"),
        (["run", "solver=dimm"], "unknown solver 'dimm', did you mean 'ddim'?"),
        (["run", "solver.etaa=1"], "did you mean 'eta'?"),
        (["run", "solver=ddim", "solver.etaa=1"], "did you mean 'eta'?"),
        (["run", "metrics=[frechett]"], "unknown metric 'frechett', did you mean 'frechet'?"),
        (["run", "space=weigths"], "unknown space 'weigths', did you mean 'weights'?"),
        (["list", "solvver"], "unknown kind 'solvver', did you mean 'solver'?"),
        (["show", "heunn"], "unknown plug-in 'heunn', did you mean 'heun'?"),
        (["train", "digit"], "unknown embedded model 'digit', did you mean 'digits'?"),
        (["report", "name=tinny"], "did you mean 'tiny'?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(
    solvus: Solvus, finished: Path, argv: list[str], message: str
) -> None:
    root = [] if argv[0] in ("list", "show", "train", "solver=ddim") else [f"root={finished}"]
    done = solvus(*argv, *root)
    assert done.code == 2 and message in done.err
    assert "Traceback" not in done.err
