"""``solvus export`` and ``solvus show schedule``: what is exported as what, that it runs, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from orchestrator.config import read_schedule
from orchestrator.export import candidates, readme
from orchestrator.export.candidates import Candidate
from orchestrator.export.check import TOLERANCE
from orchestrator.export.point import point
from orchestrator.export.write import write
from tasks import calibration
from tasks.checkpoint import WEIGHTS
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.schedule import SolverSchedule, Step
from tasks.scheduler import UnifiedScheduler

# diffusers does numpy arithmetic on tensors in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

Solvus = Callable[..., Any]


@pytest.fixture
def exported(solvus: Solvus, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that exports and returns what the command says."""

    def call(*argv: str) -> dict[str, Any]:
        done = solvus("export", *argv, f"root={tmp_path / 'root'}", "--out", str(tmp_path / "out"), "--json")
        assert done.code == 0, done.err
        assert done.data["ok"] and done.data["largest_difference"] <= TOLERANCE
        found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert found == set(done.data["files"])
        assert json.loads((tmp_path / "out" / "check.json").read_text()) == {
            key: value for key, value in done.data.items() if key != "folder"
        }
        return done.data

    return call


def snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The README's snippet, run in its folder: the names that it leaves."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert len(code) == 1 and len(code[0].split("\n\n")[1].strip().splitlines()) == 6  # the network, then five lines
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code[0], names)
    return names


EXPORTS = [
    (["model=digits", "solver=ddim"], "DDIMScheduler", {"num_inference_steps": 10}),
    (
        ["model=digits", "solver=euler", "times.num_steps=4", "guidance=cfg"],
        "DDIMScheduler",
        {"num_inference_steps": 4},
    ),
    (
        ["model=digits", "solver=ddim", "times=explicit", "times.values=[1,0.7,0.4,0.1,0]"],
        "DPMSolverMultistepScheduler",
        {"timesteps": [999, 699, 399, 99]},
    ),
    (
        ["model=digits", "solver=dpmpp_2m", "times.num_steps=5"],
        "DPMSolverMultistepScheduler",
        {"timesteps": [999, 799, 599, 399, 199]},
    ),
    (["model=digits", "solver=unified", "solver.preset=unipc"], "UniPCMultistepScheduler", {"num_inference_steps": 10}),
    (
        ["model=digits", "solver=heun", "times.num_steps=4"],
        "HeunDiscreteScheduler",
        {"timesteps": [999, 749, 499, 249]},
    ),
    (["model=digits", "solver=ddim", "times.num_steps=7"], "UnifiedScheduler", {"num_inference_steps": 7}),
    (["model=digits", "solver=ddim", "solver.eta=0.5"], "UnifiedScheduler", {"num_inference_steps": 10}),
    (
        ["model=digits", "solver=unified", "solver.preset=unipc", "times=karras", "guidance=cfg"],
        "UnifiedScheduler",
        {"num_inference_steps": 10},
    ),
    (
        ["model=digits_flow", "solver=euler", "times.num_steps=3"],
        "FlowMatchEulerDiscreteScheduler",
        {"sigmas": pytest.approx([1.0, 2 / 3, 1 / 3])},
    ),
    (["model=digits_flow", "solver=heun", "times.num_steps=3"], "UnifiedScheduler", {"num_inference_steps": 3}),
    (
        ["model=digits", "solver=diffusers", "solver.scheduler=EulerAncestralDiscreteScheduler", "times=stock"],
        "EulerAncestralDiscreteScheduler",
        {"num_inference_steps": 10},
    ),
    (
        ["model=digits_flow", "solver=diffusers", "solver.scheduler=UniPCMultistepScheduler", "times=stock"],
        "UniPCMultistepScheduler",
        {"num_inference_steps": 10},
    ),
    (["model=gmm", "solver=ddim"], "DDIMScheduler", {"num_inference_steps": 10}),
    (["model=gmm", "solver=ddim", "times=logsnr"], "UnifiedScheduler", {"num_inference_steps": 10}),
    (
        ["model=gmm", "model.process=edm", "solver=heun", "times=karras"],
        "UnifiedScheduler",
        {"num_inference_steps": 10},
    ),
]


@pytest.mark.parametrize(("argv", "name", "call"), EXPORTS, ids=[" ".join(argv) for argv, _, _ in EXPORTS])
def test_points_are_exported_as_the_stock_class_that_says_them_and_their_readme_runs(
    exported: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    name: str,
    call: dict[str, Any],
) -> None:
    found = exported(*argv)
    assert (found["scheduler"], found["set_timesteps"], found["rejected"]) == (name, call, [])
    saved = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    names = snippet(tmp_path / "out", monkeypatch)
    assert torch.isfinite(names["x"]).all() and type(names["scheduler"]).__name__ == name


def test_the_snippet_makes_the_rows_of_the_study(
    exported: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported("model=digits", "solver=dpmpp_2m", "times=karras", "times.num_steps=6")
    recipe = Recipe("digits", "dpmpp_2m", {"name": "karras", "num_steps": 6}, "none", "single").completed()  # type: ignore[arg-type]
    rows = generate(recipe, 0, 4)["x0"]
    from tasks.noise import RowNoise

    start = RowNoise(0, torch.arange(4)).at(-1).normal((1, 8, 8), "prior")
    monkeypatch.setattr(torch, "randn", lambda *shape: start)
    names = snippet(tmp_path / "out", monkeypatch)
    np.testing.assert_allclose(names["x"].clamp(-1, 1).numpy(), rows, rtol=0, atol=TOLERANCE)


SEARCHED = SolverSchedule(
    (1.0, 0.81, 0.55, 0.3, 0.1, 0.0),
    (
        Step(),
        Step(order=2, relax="bh2", corrector="pseudo"),
        Step(order=3, prediction="eps", variable="rho"),
        Step(order=2, scale=(0.9,), corrector="implicit"),
        Step(),
    ),
    "found by a search",
)


def test_a_searched_schedule_is_exported_whole_and_can_be_run_again(
    solvus: Solvus, exported: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    path.write_text(SEARCHED.to_json())
    found = exported("model=digits", f"schedule={path}")
    assert found["scheduler"] == "UnifiedScheduler"
    again = read_schedule(str(tmp_path / "out" / "schedule.json"))
    assert (again.times, again.steps) == (SEARCHED.times, SEARCHED.steps)
    scheduler = UnifiedScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == SEARCHED.nfe == 6
    second = solvus("export", "model=digits", f"schedule={tmp_path / 'out' / 'schedule.json'}", "--out",
                    str(tmp_path / "second"), "--json")  # fmt: skip
    assert second.data["recipe"] == found["recipe"]


def test_a_preset_can_be_asked_for_another_number_of_steps(
    exported: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    exported("model=digits", "solver=unified", "solver.preset=dpmpp_3m", "times=karras", "times.rho=5")
    scheduler = UnifiedScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.grid == {"name": "karras", "rho": 5.0} and scheduler.config.schedule is None
    scheduler.set_timesteps(17)
    assert len(scheduler.timesteps) == 17


def test_artifacts_travel_with_the_export(exported: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    hook = "solver.hooks=[{name: compensation, num_samples: 2, num_held_out: 2, num_reference: 8}]"
    argv = ["model=digits", "solver=unified", "solver.preset=unipc", hook, "times.num_steps=4"]
    found = exported(*argv)
    assert found["scheduler"] == "UnifiedScheduler" and "artifact-solver.hooks.0.safetensors" in found["files"]
    scheduler = UnifiedScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    meta, arrays = calibration._read(str(tmp_path / "out" / "artifact-solver.hooks.0.safetensors"), {})
    assert meta["plugin"] == "compensation" and scheduler.config.hooks[0]["ratios"] == arrays["ratios"].tolist()


def test_states_that_begin_later_keep_their_artifact_and_their_first_time(
    exported: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = exported("model=digits", "solver=ddim", "initial=teleport", "times=karras", "times.num_steps=4")
    assert found["scheduler"] == "UnifiedScheduler" and "artifact-initial.safetensors" in found["files"]
    assert read_schedule(str(tmp_path / "out" / "schedule.json")).times[0] < 0.9
    assert "as `initial=teleport` makes them" in (tmp_path / "out" / "README.md").read_text()


def test_a_trial_of_a_finished_study_is_exported(solvus: Solvus, finished: Path, tmp_path: Path) -> None:
    made = {}
    for number in (0, 3):
        argv = ["study=tiny", f"trial={number}", f"root={finished}", "--out", str(tmp_path / str(number)), "--json"]
        made[number] = solvus("export", *argv).data
    assert made[0]["recipe"] != made[3]["recipe"] and made[0]["ok"] and made[3]["ok"]
    wrong = solvus("export", "study=tiny", "trial=99", f"root={finished}", "--out", str(tmp_path / "x"))
    assert wrong.code == 2 and "study tiny has no trial '99'. It has 0 to" in wrong.err
    absent = solvus("export", "study=quickstart", "trial=0", f"root={finished}", "--out", str(tmp_path / "x"))
    assert absent.code == 2 and "Run it first" in absent.err


def test_an_unconditional_unet_is_exported_from_its_own_folder(
    exported: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "model")
    found = exported("model=unet", f"model.path={tmp_path / 'model'}", "solver=dpmpp_2m", "times=logsnr")
    assert found["scheduler"] == "UnifiedScheduler"
    scheduler = UnifiedScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    own = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model", scheduler=scheduler)
    own.set_progress_bar_config(disable=True)
    images = own(batch_size=1, num_inference_steps=6, output_type="pt").images
    assert torch.isfinite(images).all()
    assert torch.isfinite(snippet(tmp_path / "out", monkeypatch)["x"]).all()


# --- the check -------------------------------------------------------------------------------------------------------


def test_a_stock_class_that_differs_gives_way_to_the_unified_scheduler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = Recipe("digits", "ddim", "uniform", "none", "single").completed()  # type: ignore[arg-type]
    original = candidates._stock

    def slightly_wrong(p: Any) -> Any:
        for name, config, call in original(p):
            yield name, config | {"beta_end": 0.0161}, call

    monkeypatch.setattr(candidates, "_stock", slightly_wrong)
    found = write(point(recipe), tmp_path / "out")
    assert found["scheduler"] == "UnifiedScheduler" and found["ok"]
    assert [gone["scheduler"] for gone in found["rejected"]] == ["DDIMScheduler", "DPMSolverMultistepScheduler"]
    assert all("it differs by" in gone["reason"] for gone in found["rejected"])


def test_an_export_that_differs_fails(solvus: Solvus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(p: Any, prediction: str) -> Candidate:
        return Candidate(UnifiedScheduler(preset="ddim"), {"num_inference_steps": 10})

    monkeypatch.setattr(candidates, "_own", wrong)
    argv = ["export", "model=digits", "solver=unified", "times=karras", "--out", str(tmp_path / "out")]
    failed = solvus(*argv)
    assert failed.code == 1 and failed.out.startswith("export FAILED: UnifiedScheduler")
    saved = json.loads((tmp_path / "out" / "check.json").read_text())
    assert not saved["ok"] and saved["largest_difference"] > TOLERANCE and "it differs by" in saved["reason"]
    assert "This export FAILED" in (tmp_path / "out" / "README.md").read_text()


REFUSED = [
    (["solver=dopri5"], "solver dopri5 cannot be said as a diffusers scheduler. Allowed: ddim, euler"),
    (["solver=unified", "solver.hooks=[{name: time_shift}]"], "hook time_shift changes what the network is told"),
    (["strategy=best_of_n", "reward=ink"], "strategy best_of_n runs several trajectories"),
    (["times=travel"], "times travel jump back"),
    (["model=gmm", "model.process=mr"], "steps VP, flow and EDM processes, not MeanReverting"),
    (
        ["model.process=edm", "solver=diffusers", "solver.scheduler=EDMEulerScheduler", "times=stock"],
        "stock EDM classes expect networks with a preconditioning of their own",
    ),
    (["solver=heunn"], "did you mean 'heun'"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_what_no_scheduler_can_do_is_refused_and_nothing_is_written(
    solvus: Solvus, tmp_path: Path, argv: list[str], message: str
) -> None:
    done = solvus("export", *argv, f"root={tmp_path / 'root'}", "--out", str(tmp_path / "out"))
    assert done.code == 2 and message in done.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "root").exists()


def test_a_folder_that_holds_something_is_left_alone(solvus: Solvus, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = solvus("export", "--out", str(tmp_path))
    assert done.code == 2 and "is not an empty folder. Give a new one" in done.err
    assert solvus("export", "model=gmm").code == 2  # no --out
    shown = solvus("export", "model=gmm", "--cfg", "--json", "--out", str(tmp_path / "out"))
    assert shown.code == 0 and shown.data["model"]["name"] == "gmm" and not (tmp_path / "out").exists()


def test_weights_come_from_the_package_or_from_an_absolute_folder() -> None:
    recipe = Recipe("digits", "ddim", "uniform", "none", "single").completed()  # type: ignore[arg-type]
    text = readme._imports(point(recipe), {"scheduler": "DDIMScheduler"})
    assert 'WEIGHTS / "digits" / "unet"' in text and str(WEIGHTS) not in text


# --- show schedule ---------------------------------------------------------------------------------------------------


def test_show_schedule_reads_every_step_aloud_and_draws_it(solvus: Solvus, tmp_path: Path) -> None:
    path, page = tmp_path / "found.json", tmp_path / "page.html"
    path.write_text(SEARCHED.to_json())
    told = solvus("show", "schedule", str(path))
    assert told.code == 0 and told.out.startswith("5 steps, 6 evaluations: found by a search")
    assert "order 3, noise prediction, in sigma / alpha" in told.out and len(told.out.splitlines()) == 6
    data = solvus("show", "schedule", str(path), "--json").data
    assert (data["nfe"], data["stochastic"], len(data["steps"])) == (6, False, 5)
    drawn = solvus("show", "schedule", str(path), "--html", str(page))
    assert drawn.code == 0 and "plotly" in page.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["schedule"], "show schedule needs a file"),
        (["schedule", "absent.json"], "cannot read the schedule 'absent.json'"),
        (["ddim", "found.json"], "belongs to `solvus show schedule FILE`"),
        (["ddim", "--html", "x.html"], "belongs to `solvus show schedule FILE`"),
    ],
    ids=str,
)
def test_show_refuses_what_it_cannot_show(solvus: Solvus, argv: list[str], message: str) -> None:
    done = solvus("show", *argv)
    assert done.code == 2 and message in done.err
