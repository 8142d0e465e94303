"""The command line as people use it: exit status, messages, JSON, interruptions."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import rows
from orchestrator.registries import EVERY
from orchestrator.results import Results
from orchestrator.store import Store
from tasks import run as tasks_run
from tasks.checkpoint import WEIGHTS
from tasks.recipe import Recipe

Solvus = Callable[..., Any]
SMALL = ["model=gmm", "name=small", "num_samples=64", "batch_size=32", "shard_size=32", "times.num_steps=4",
         "tracker=none"]  # fmt: skip


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", *argv]


def begin(*argv: str) -> subprocess.Popen[str]:
    """The command in a process of its own, in which SIGINT means what it means on a terminal."""
    return subprocess.Popen(
        command(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_records(process: subprocess.Popen[str], root: Path, count: int) -> None:
    """Until so many shards are committed; the process must be running still."""
    deadline = time.monotonic() + 60
    while len(list((root / "store" / "rows").rglob("*.json"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def samples(root: Path) -> dict[str, np.ndarray]:
    """The samples of every recipe of a root, by key, in index order."""
    store, found = Store(root), {}
    for row in Results(str(root), "small").trials():
        shape = Recipe(**store.get_json("recipes", row["key"])).parts.model.shape
        tables = store.read("rows", row["key"], row["first_index"], row["first_index"] + row["num_samples"])
        found[row["key"]] = np.concatenate([rows.samples(table, shape) for table in tables])
    return found


# --- run -------------------------------------------------------------------------------------------------------------


def test_a_run_prints_one_json_object_and_a_rerun_calls_no_model(
    solvus: Solvus, tmp_path: Path, generated: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["run", *SMALL, f"root={tmp_path}", "--json"]
    first = subprocess.run(command(*argv), capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert (summary["state"], summary["trials"], summary["samples_made"]) == ("complete", 1, 64)
    assert summary["nfe"] == 64 * 4
    assert Path(summary["report"]).is_file()
    assert "Traceback" not in first.stderr and "samples made" in first.stderr

    monkeypatch.setattr("tasks.models.gmm.MixtureDenoiser.denoise", lambda *_: pytest.fail("the model was called"))
    second = solvus(*argv)
    assert second.code == 0
    assert (second.data["samples_made"], second.data["samples_reused"], second.data["nfe"]) == (0, 64, 0)
    assert generated == []


def test_without_json_the_result_is_on_stdout_and_progress_on_stderr(solvus: Solvus, tmp_path: Path) -> None:
    done = solvus("run", *SMALL, f"root={tmp_path}")
    assert done.code == 0
    assert done.out.startswith("small: complete, 1 trials (0 failed), 64 samples made")
    assert "report: " in done.out and "trials 1/1" in done.err and "trials 1/1" not in done.out


def test_a_failed_shard_is_exit_status_one_with_its_reason_and_a_way_to_reproduce(
    solvus: Solvus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tasks_run.generate

    def broken(recipe: Recipe, start: int, stop: int, *rest: Any, **more: Any) -> Any:
        if start == 32:
            raise RuntimeError("the device fell off")
        return original(recipe, start, stop, *rest, **more)

    argv = ["run", *SMALL, f"root={tmp_path}", "search=grid", "search.space={seed:[0,1]}"]
    with monkeypatch.context() as patch:
        patch.setattr(tasks_run, "generate", broken)
        failed = solvus(*argv, "--json")
        told = solvus(*argv)
    assert (failed.code, told.code) == (1, 1)
    assert (failed.data["state"], failed.data["failed"], failed.data["samples_made"]) == ("failed", 2, 64)
    assert "RuntimeError: the device fell off" in told.out and "Reproduce here: solvus shard" in told.err
    assert "Traceback" not in told.err
    stands = solvus("status", "name=small", f"root={tmp_path}", "--json").data[0]
    assert (stands["state"], stands["failed"]) == ("failed", 2) and "fell off" in stands["reasons"][0]
    assert solvus(*argv).code == 0


def test_a_recipe_that_overflows_is_exit_status_one_and_leaves_no_rows(solvus: Solvus, tmp_path: Path) -> None:
    done = solvus("run", *SMALL, "model.means=[[1e39,0]]", f"root={tmp_path}")
    assert done.code == 1
    assert "none of its 64 samples is left. Sample 0: not finite: the network's answer at step 1 of" in done.out
    assert list((tmp_path / "store").rglob("*.parquet")) == []


def test_a_batch_that_no_memory_holds_is_wrong_usage_before_any_work(solvus: Solvus, tmp_path: Path) -> None:
    for verb in ("plan", "run"):
        done = solvus(verb, *SMALL, "batch_size=100000000000", "num_samples=8", f"root={tmp_path}")
        assert done.code == 2 and "batch_size=100000000000 is so many states of shape (2,)" in done.err
        assert "Set batch_size to at most" in done.err


# --- wrong usage -----------------------------------------------------------------------------------------------------


def _checkpoint(tmp_path: Path, damage: Callable[[Path], object]) -> list[str]:
    copy = tmp_path / "copy"
    shutil.copytree(WEIGHTS / "digits", copy)
    damage(copy / "unet")
    return ["model=unet", f"model.path={copy}"]


def _truncate(unet: Path) -> None:
    path = unet / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _reshape(unet: Path) -> None:
    config = json.loads((unet / "config.json").read_text())
    config["block_out_channels"] = [2 * width for width in config["block_out_channels"]]
    (unet / "config.json").write_text(json.dumps(config))


def _file_as_root(tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_text("")
    return [f"root={tmp_path / 'file'}"]


def _other_format(tmp_path: Path) -> list[str]:
    (tmp_path / "other" / "store").mkdir(parents=True)
    (tmp_path / "other" / "store" / "FORMAT.json").write_text('{"format": 99}')
    return [f"root={tmp_path / 'other'}"]


WRONG: dict[str, tuple[list[str] | Callable[[Path], list[str]], str]] = {
    "unknown plug-in": (["solver=huen"], "unknown solver 'huen', did you mean 'heun'?"),
    "unknown field": (["solver=ddim", "solver.etta=1"], "'etta', did you mean 'eta'?"),
    "wrong type": (["num_samples=abc"], "num_samples must be a whole number, got 'abc'"),
    "token solver on an image model": (["model=digits", "solver=ancestral"], "steps masked processes"),
    "times that rise": (["times=explicit", "times.values=[1,0.5,0.6,0]"], "strictly decreasing"),
    "no samples": (["num_samples=0"], "num_samples must be at least 1, got 0"),
    "truncated checkpoint": (lambda tmp_path: _checkpoint(tmp_path, _truncate), "is damaged"),
    "checkpoint of another shape": (lambda tmp_path: _checkpoint(tmp_path, _reshape), "does not fit"),
    "root that cannot be written": (_file_as_root, "cannot be"),
    "store of another format": (_other_format, "store format 99"),
    "unknown study": (["study=tinny"], "unknown study 'tinny', did you mean 'tiny'?"),
    "workers that are no number": (["executor=ray", "executor.workers=many"], "executor.workers"),
    "no workers": (["executor=ray", "executor.workers=-1"], "workers must be at least 0"),
    "metric that needs labels": (["metrics=[class_accuracy]"], "class"),
    "too few samples for a metric": (["num_samples=2", "metrics=[{name: frechet, features: identity}]"], "rank"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_exit_status_two_with_one_or_two_sentences(
    solvus: Solvus, tmp_path: Path, verb: str, name: str
) -> None:
    given, message = WRONG[name]
    wrong = given(tmp_path) if callable(given) else given
    done = solvus(verb, "tracker=none", f"root={tmp_path / 'root'}", *wrong)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.strip().splitlines()
    assert line.startswith("solvus: ") and message in line
    assert line.count(". ") <= 2 and len(line) < 500
    assert not (tmp_path / "root" / "studies").exists()


def test_wrong_usage_prints_no_traceback_and_its_json_is_one_object() -> None:
    done = subprocess.run(command("run", "solver=huen", "--json"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].startswith("unknown solver 'huen', did you mean 'heun'?")
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["rnu"], ["run", "--jsn"], ["run", "heun"], ["show"], ["shard"]])
def test_a_command_that_cannot_be_parsed_is_exit_status_two(solvus: Solvus, argv: list[str]) -> None:
    assert solvus(*argv).code == 2


# --- verbs that read -------------------------------------------------------------------------------------------------


def test_plan_says_what_is_missing_and_makes_nothing(solvus: Solvus, tmp_path: Path, generated: list) -> None:
    argv = [*SMALL, f"root={tmp_path}", "search=grid", "search.space={nfe:[2,4]}", "price_per_device_hour=2"]
    plan = solvus("plan", *argv, "--json").data
    assert (plan["trials"], plan["shards"], plan["samples"], plan["samples_to_make"]) == (2, 4, 128, 128)
    assert plan["nfe"] == 64 * 2 + 64 * 4
    assert plan["device_s"] >= 0 and plan["disk_bytes"] > 0
    told = solvus("plan", *argv)
    assert told.code == 0 and "shards to run   4" in told.out
    assert generated == []
    assert solvus("run", *argv).code == 0
    plan = solvus("plan", *argv, "--json").data
    assert (plan["shards"], plan["samples_to_make"], plan["nfe"]) == (0, 0, 0)


def test_plan_can_be_asked_before_it_is_known_how_many_workers_there_will_be(solvus: Solvus, tmp_path: Path) -> None:
    plan = solvus("plan", *SMALL, f"root={tmp_path}", "executor=ray", "executor.workers=0", "--json")
    assert plan.code == 0 and plan.data["samples_to_make"] == 64


def test_plan_counts_a_trial_that_comes_twice_once(solvus: Solvus, tmp_path: Path, generated: list) -> None:
    argv = [*SMALL, f"root={tmp_path}", "search=grid", "search.space={times.num_steps:[4,4]}"]
    plan = solvus("plan", *argv, "--json").data
    done = solvus("run", *argv, "--json").data
    assert (plan["samples_to_make"], plan["nfe"]) == (done["samples_made"], done["nfe"])
    assert plan["shards"] == len(generated) == 2


def test_status_lists_the_studies_of_a_root(solvus: Solvus, finished: Path, tmp_path: Path) -> None:
    (row,) = solvus("status", f"root={finished}", "--json").data
    assert (row["study"], row["state"], row["trials"], row["failed"]) == ("tiny", "complete", 4, 0)
    assert Path(row["report"]).is_file()
    told = solvus("status", "study=tiny", f"root={finished}")
    assert told.code == 0 and "tiny" in told.out and "complete" in told.out
    assert "no studies" in solvus("status", f"root={tmp_path}").out
    assert solvus("status", "name=absent", f"root={finished}").code == 2


def test_a_study_whose_process_is_gone_is_interrupted_not_running(
    solvus: Solvus, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "root")
    path = tmp_path / "root" / "studies" / "tiny" / "state.json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "running", "pid": gone.pid}))
    assert solvus("status", f"root={tmp_path / 'root'}", "--json").data[0]["state"] == "interrupted"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    assert solvus("status", f"root={tmp_path / 'root'}", "--json").data[0]["state"] == "running"


def test_list_names_every_plug_in_and_every_study(solvus: Solvus) -> None:
    found = solvus("list", "--json").data
    assert {"model", "solver", "metric", "search", "executor", "tracker", "study"} <= set(found)
    assert {"gmm", "digits"} <= set(found["model"]) and {"tiny", "quickstart"} <= set(found["study"])
    assert all(summary for entries in found.values() for summary in entries.values())
    told = solvus("list", "solvers")
    assert told.code == 0 and "heun" in told.out and "gmm" not in told.out
    wrong = solvus("list", "slover")
    assert wrong.code == 2 and "did you mean 'solver'" in wrong.err


def test_show_gives_fields_defaults_and_the_reference(solvus: Solvus) -> None:
    shown = solvus("show", "karras", "--json").data["times"]
    assert shown["fields"]["rho"] == {"type": "float", "default": 7.0} and "Reference" in shown["doc"]
    told = solvus("show", "karras")
    assert told.code == 0 and "times.rho: float = 7.0" in told.out
    wrong = solvus("show", "kerras")
    assert wrong.code == 2 and "did you mean 'karras'" in wrong.err


def test_report_is_rebuilt_from_what_is_there(solvus: Solvus, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "root")
    page = tmp_path / "root" / "studies" / "tiny" / "report.html"
    page.unlink()
    done = solvus("report", "study=tiny", f"root={tmp_path / 'root'}", "--json")
    assert (done.code, done.data) == (0, {"report": str(page)}) and page.stat().st_size > 1000
    told = solvus("report", "study=tiny", f"root={tmp_path / 'root'}")
    assert (told.code, told.out.strip()) == (0, str(page))
    assert solvus("report", f"root={tmp_path / 'root'}").code == 2
    absent = solvus("report", "name=absent", f"root={tmp_path / 'root'}")
    assert absent.code == 2 and "Run it first" in absent.err


def test_verify_finds_a_flipped_bit_and_withdrawing_lets_the_next_run_repair_it(
    solvus: Solvus, finished: Path, tmp_path: Path, generated: list
) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    before = {p.name.split(".")[0]: p for p in (root / "store" / "rows").rglob("*.parquet")}
    whole = solvus("verify", f"root={root}", "--json")
    assert whole.code == 0 and whole.data["wrong"] == [] and whole.data["files"] > 2 * len(before)
    path = next(iter(before.values()))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    wrong = solvus("verify", f"root={root}", "--json")
    assert wrong.code == 1 and len(wrong.data["wrong"]) == 1 and path.name in wrong.data["wrong"][0]
    assert solvus("verify", f"root={root}", "--withdraw").code == 1
    told = solvus("verify", f"root={root}")
    assert told.code == 0 and "0 wrong" in told.out
    space = "{solver:[ddim,heun],nfe:[3,5]}"
    again = solvus("run", "study=tiny", f"search.space={space}", "num_samples=64", "batch_size=32", "shard_size=32",
                   "tracker=none", f"root={root}", "--json")  # fmt: skip
    assert again.code == 0
    assert len(generated) <= 1  # values were kept; the rows are made again when somebody needs them


@pytest.mark.parametrize("order", [1, -1])
def test_a_shard_made_again_equals_the_stored_one_bit_for_bit(solvus: Solvus, finished: Path, order: int) -> None:
    key = Results(str(finished), "tiny").trials()[0]["key"]
    argv = [f"root={finished}", f"{key}/20-52"][::order]
    done = solvus("shard", *argv, "--json")
    assert done.code == 0, done.err
    assert (done.data["equal_to_stored"], done.data["start"], done.data["stop"]) == (True, 20, 52)
    assert "equal, bit for bit" in solvus("shard", *argv).out


def test_a_shard_that_differs_or_is_not_stored_says_so(
    solvus: Solvus, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Results(str(finished), "tiny").trials()[0]["key"]
    absent = solvus("shard", f"root={finished}", f"{key}/0-100", "--json")
    assert (absent.code, absent.data["equal_to_stored"]) == (0, None)
    monkeypatch.setattr("tasks.models.gmm.MixtureDenoiser.decode", lambda self, x0, cond=None: x0 + 1e-6)
    other = solvus("shard", f"root={finished}", f"{key}/0-32")
    assert other.code == 1 and "DIFFERENT" in other.out


@pytest.mark.parametrize("name", ["nonsense", "abc/0", "abc/a-b", "../../etc/passwd/0-1", "0" * 32 + "/0-1"])
def test_a_shard_that_does_not_exist_is_refused(solvus: Solvus, finished: Path, name: str) -> None:
    done = solvus("shard", f"root={finished}", name)
    assert done.code == 2 and len(done.err.splitlines()) == 1


def test_doctor_finds_what_is_needed(solvus: Solvus) -> None:
    findings = solvus("doctor", "--json")
    assert findings.code == 0
    assert {"python", "torch", "accelerator", "root"} <= {finding["what"] for finding in findings.data}
    told = solvus("doctor")
    assert told.code == 0 and "all that is needed is here" in told.out


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_cfg_prints_the_configuration_and_runs_nothing(solvus: Solvus, tmp_path: Path, verb: str) -> None:
    done = solvus(verb, "solver=heun", f"root={tmp_path / 'root'}", "--cfg", "--json")
    assert done.code == 0 and done.data["solver"]["name"] == "heun"
    assert "name: heun" in solvus(verb, "solver=heun", f"root={tmp_path / 'root'}", "--cfg").out
    assert not (tmp_path / "root").exists()


def test_every_plugin_shows_its_fields(solvus: Solvus) -> None:
    for kind, registry in EVERY.items():
        for name in registry.names():
            shown = solvus("show", name, "--json")
            assert shown.code == 0, (kind, name, shown.err)
            described = shown.data[kind]["fields"]
            assert {"name", *described} == set(registry.defaults(name)) and all(
                f["type"] for f in described.values()
            ), name


@pytest.mark.parametrize("verb", ["gc", "verify", "status", "report", "ui"])
def test_cfg_belongs_to_verbs_that_compose_a_study(solvus: Solvus, tmp_path: Path, verb: str) -> None:
    refused = solvus(verb, f"root={tmp_path}", "--cfg")
    assert refused.code == 2 and "--cfg" in refused.err and "unknown option" in refused.err


@pytest.mark.parametrize("argv", [["list", "solver", "nfe=4"], ["train", "digits", "steps=5"], ["doctor", "root=x"]])
def test_settings_are_refused_by_verbs_that_take_none(solvus: Solvus, argv: list[str]) -> None:
    refused = solvus(*argv)
    assert refused.code == 2 and "takes no settings" in refused.err and argv[-1] in refused.err


def test_a_frozen_configuration_takes_nothing_beside_it(solvus: Solvus, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen.json"
    frozen.write_text(json.dumps(solvus("run", "study=tiny", f"root={tmp_path}", "--cfg", "--json").data))
    for beside in (["num_samples=99"], ["--cfg"], ["--config-dir", str(tmp_path)]):
        refused = solvus("run", "--frozen", str(frozen), *beside)
        assert refused.code == 2 and "nothing beside it" in refused.err and beside[0] in refused.err
    assert not (tmp_path / "store").exists()


def test_help_and_version_answer_without_heavy_imports() -> None:
    code = (
        "import sys; from orchestrator.cli import main\n"
        "for argv in (['--help'], ['run', '--help'], ['--version']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'diffusers', 'ray', 'mlflow', 'optuna', 'pyarrow', 'numpy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "exit status: 0 complete" in done.stdout
    assert done.stdout.rstrip().endswith("LOADED []")


# --- interruptions ---------------------------------------------------------------------------------------------------

LONG = ["model=gmm", "name=small", "num_samples=1600", "batch_size=16", "shard_size=16", "tracker=none"]


def test_an_interrupted_run_says_how_to_continue_and_that_completes_it(
    solvus: Solvus, tmp_path: Path, generated: list
) -> None:
    argv = ["run", *LONG, f"root={tmp_path}", "nfe=10", 'question="Is it quick, or not?"']
    process = begin(*argv)
    wait_for_records(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "continue with: " in line]
    assert shlex.split(line.partition("continue with: ")[2]) == ["solvus", *argv]
    assert solvus("status", f"root={tmp_path}", "--json").data[0]["state"] == "interrupted"
    done = solvus(*argv, "--json")
    assert done.code == 0 and done.data["state"] == "complete"
    assert done.data["samples_made"] + done.data["samples_reused"] == 1600
    assert done.data["samples_reused"] >= 48
    assert done.data["samples_made"] == sum(stop - start for _, start, stop in generated) > 0


@pytest.mark.parametrize(("model", "count"), [("gmm", 1600), ("digits", 240)])
def test_rows_after_kill_nine_and_a_rerun_are_those_of_an_undisturbed_run(
    solvus: Solvus, tmp_path: Path, model: str, count: int
) -> None:
    argv = ["run", *LONG, f"model={model}", f"num_samples={count}", "nfe=5"]
    process = begin(*argv, f"root={tmp_path / 'killed'}")
    wait_for_records(process, tmp_path / "killed", 4)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = solvus(*argv, f"root={tmp_path / 'killed'}", "--json")
    assert done.code == 0 and 0 < done.data["samples_made"] < count
    assert solvus("verify", f"root={tmp_path / 'killed'}").code == 0
    assert solvus(*argv, f"root={tmp_path / 'whole'}", "shard_size=160").code == 0
    killed, whole = samples(tmp_path / "killed"), samples(tmp_path / "whole")
    assert killed.keys() == whole.keys() and len(killed) == 1
    assert all(len(killed[key]) == count and np.array_equal(killed[key], whole[key]) for key in whole)
