"""Configuration: what composes is frozen and saved; what does not says what is wrong and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from orchestrator import config
from orchestrator.registries import EVERY
from orchestrator.study import Study


def composed(*overrides: str, dirs: tuple[str, ...] = ()) -> Study:
    return config.study(config.compose(overrides, dirs))


# --- what composes ---------------------------------------------------------------------------------------------------


def test_without_overrides_the_defaults_make_a_runnable_study() -> None:
    from orchestrator.ports import Proposal

    study = composed()
    assert (study.name, study.recipe.model["name"], study.recipe.solver["name"]) == ("adhoc", "gmm", "ddim")
    assert (study.search["name"], study.recipe.reward, study.recipe.strategy["name"]) == ("single", None, "single")
    assert [spec["name"] for spec in study.metrics] == ["cost"]
    assert study.trial(0, Proposal({})).num_samples == 1024


def test_a_study_with_overrides_on_the_command_line() -> None:
    study = composed("study=tiny", "solver=heun", "times.num_steps=5")
    assert (study.name, study.recipe.solver["name"], study.recipe.times["num_steps"]) == ("tiny", "heun", 5)
    assert study.recipe.nfe == 9
    assert study.search["name"] == "grid" and study.num_samples == 512
    assert [spec["name"] for spec in study.metrics] == ["frechet", "kid", "cost"]


@pytest.mark.parametrize("group", ["model", "solver", "times", "guidance", "strategy", "reward", "executor", "tracker"])
def test_every_registered_plug_in_can_be_chosen_by_its_name(group: str) -> None:
    for name in EVERY[group].names():
        found = config.compose([f"{group}={name}"])[group]
        assert found == EVERY[group].defaults(name)


def test_fields_of_a_chosen_plug_in_can_be_set_without_a_file() -> None:
    study = composed("times=karras", "times.rho=5", "solver=ddim", "solver.eta=0.5", "seed=7", "metrics=[kid]")
    assert (study.recipe.times["rho"], study.recipe.solver["eta"], study.recipe.seed) == (5.0, 0.5, 7)
    assert [spec["name"] for spec in study.metrics] == ["kid", "cost"]


SPECS = [
    (["times={name:explicit,values:[0.801,0]}"], ["times=explicit", "times.values=[0.801,0]"]),
    (["solver={name: ddim, eta: 0.5}", "solver.eta=1"], ["solver=ddim", "solver.eta=1"]),
    (["model={name: digits, path: '/a b, {c}'}"], ["model=digits", "model.path='/a b, {c}'"]),
    (["search={name: grid, space: {seed: [2, 3]}}"], ["search=grid", "search.space={seed: [2, 3]}"]),
    (["reward={name: weighted, rewards: [{name: ink}, {name: linear}], weights: [1, -0.5]}"],
     ["reward=weighted", "reward.rewards=[{name: ink}, {name: linear}]", "reward.weights=[1, -0.5]"]),
    (["study=tiny", "guidance={name: none}"], ["study=tiny", "guidance=none"]),
]  # fmt: skip


@pytest.mark.parametrize(("together", "apart"), SPECS)
def test_a_plug_in_and_its_fields_can_be_given_together(together: list[str], apart: list[str]) -> None:
    assert config.compose(together) == config.compose(apart)


def test_nfe_sets_the_number_of_steps_to_match() -> None:
    assert [composed("solver=heun", f"nfe={n}").recipe.nfe for n in (4, 5, 16)] == [4, 5, 16]


def test_a_study_can_do_without_its_reward() -> None:
    assert composed("reward=ink").recipe.reward == {"name": "ink"}
    assert composed("study=quickstart", "reward=null").recipe.reward is None


def test_every_study_that_ships_composes_and_its_trials_can_run(tmp_path: Path) -> None:
    from orchestrator.registries import searches

    for name in config.studies():
        study = composed(f"study={name}", f"root={tmp_path}")
        proposals = list(searches.build(study.search).start(study.context()).preview())
        assert proposals, name
        assert study.trial(0, proposals[0]).num_samples > 0
        assert study.question, name


def test_a_folder_of_ones_own_adds_studies(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.yaml").write_text(
        "# @package _global_\n# Is Heun better?\ndefaults:\n  - override /solver: heun\nname: mine\nnum_samples: 48\n"
    )
    study = composed("study=mine", "seed=3", dirs=(str(tmp_path),))
    assert (study.name, study.recipe.solver["name"], study.num_samples, study.recipe.seed) == ("mine", "heun", 48, 3)
    assert composed("study=tiny", dirs=(str(tmp_path),)).name == "tiny"
    with pytest.raises(ValueError, match="unknown study 'mine'"):
        composed("study=mine")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        composed(dirs=(str(tmp_path / "absent"),))


def test_the_root_is_made_absolute_and_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert composed("root=here").root == str(tmp_path / "here")
    assert composed().root == str(tmp_path / "runs")
    monkeypatch.setenv("SOLVUS_ROOT", str(tmp_path / "there"))
    assert composed().root == str(tmp_path / "there")


def test_composing_twice_gives_the_same_and_leaves_nothing_behind() -> None:
    first = config.compose(["study=tiny", "solver=heun"])
    assert config.compose([])["solver"]["name"] == "ddim"
    assert config.compose(["study=tiny", "solver=heun"]) == first


def test_a_study_is_frozen_and_its_configuration_is_plain_data() -> None:
    study = composed("study=tiny")
    with pytest.raises(FrozenInstanceError):
        study.num_samples = 3  # type: ignore[misc]
    assert json.loads(json.dumps(study.config)) == study.config


def test_what_was_run_is_saved_and_composes_to_the_same_study(solvus: Callable[..., Any], tmp_path: Path) -> None:
    argv = ["study=tiny", "search=single", "metrics=[]", "num_samples=16", "batch_size=16", "tracker=none",
            f"root={tmp_path}"]  # fmt: skip
    assert solvus("run", *argv).code == 0
    saved = json.loads((tmp_path / "studies" / "tiny" / "study.json").read_text())
    assert saved == config.compose(argv)
    assert config.study(saved) == composed(*argv)


def test_a_password_in_a_url_is_not_saved(solvus: Callable[..., Any], tmp_path: Path) -> None:
    from orchestrator.results import Results

    study = composed("tracker=mlflow", "tracker.uri=postgresql://user:hunter2@host/db", f"root={tmp_path}")
    Results(study.root, study.name).save_study(study)
    assert "user:***@host/db" in (tmp_path / "studies" / "adhoc" / "study.json").read_text()
    shown = solvus("run", "tracker=mlflow", "tracker.uri=postgresql://user:hunter2@host/db", "--cfg")
    assert "hunter2" not in shown.out + shown.err and "user:***@host/db" in shown.out


# --- what does not ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[list[str], str]] = [
    (["solver=huen"], r"unknown solver 'huen', did you mean 'heun'\? Registered: .*ddim.*euler"),
    (["model=dgits"], "unknown model 'dgits', did you mean 'digits'"),
    (["study=tinny"], "unknown study 'tinny', did you mean 'tiny'"),
    (["study=../study/tiny"], "unknown study"),
    (["sovler=heun"], "unknown key 'sovler', did you mean 'solver'"),
    (["num_sample=3"], "unknown key 'num_sample', did you mean 'num_samples'"),
    (["solver=ddim", "solver.etta=1"], r"unknown field of solver 'ddim': 'etta', did you mean 'eta'\? Fields: eta"),
    (["solver.etta=1"], r"etta.*eta"),
    (["study=tiny", "times.nmu_steps=4"], r"nmu_steps.*num_steps"),
    (["solver.eta=2"], r"solver.eta must be between 0 and 1, got 2"),
    (["solver.eta=much"], r"solver.eta must be a float, got 'much'"),
    (["times.num_steps=2.5"], "times.num_steps must be a int, got 2.5"),
    (["num_samples=abc"], "num_samples must be a whole number, got 'abc'"),
    (["num_samples=1.5"], "num_samples must be a whole number, got 1.5"),
    (["num_samples=true"], "num_samples must be a whole number, got True"),
    (["num_samples=0"], "num_samples must be at least 1, got 0"),
    (["batch_size=-1"], "batch_size must be at least 1"),
    (["shard_size=0"], "shard_size must be at least 1"),
    (["seed=null"], "seed must be a whole number"),
    (["nfe=0"], "nfe must be a whole number of at least 1"),
    (["nfe=few"], "nfe must be a whole number"),
    (["metrics=frechet"], r"metrics must be a list"),
    (
        ["study=tokens", "search.num_trials=5"],
        r"the study's search has no field 'num_trials'; it is one of search=.*tpe.*search.parts.0.num_trials=VALUE",
    ),
    (["metrics=[frechte]"], "unknown metric 'frechte', did you mean 'frechet'"),
    (["metrics=[3]"], "metric"),
    (["price_per_device_hour=free"], "price_per_device_hour"),
    (["model=null"], "model"),
    (["solver=null"], "solver"),
    (["search=null"], "search"),
    (["root=null"], "root"),
    (["name=../x"], "name becomes a folder"),
    (["name=/etc/x"], "name becomes a folder"),
    (["name=.hidden"], "name becomes a folder"),
    (["name="], "name becomes a folder"),
    ([f"name={'x' * 101}"], "name becomes a folder"),
    (["solver"], "cannot read the command line|unknown"),
    (["solver=[ddim"], "cannot read the command line"),
    (["solver={eta: 1}"], r"names no solver. Write solver=\{name: NAME, FIELD: VALUE\}: solvus list solver"),
    (["solver={name: dim}"], "unknown solver 'dim', did you mean 'ddim'"),
    (["solver={name: ddim, etta: 1}"], "unknown field of solver 'ddim': 'etta', did you mean 'eta'"),
    (["times={name: explicit, values: [1"], "cannot read the command line"),
    (["times.values=[1,0.5"], "cannot read the command line"),
    (["solver=ddim,heun"], "solver"),
    (["model._target_=os.system"], "_target_"),
    (["search=grid"], "search grid has an empty space"),
    (["root=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda v: " ".join(v)[:40] if type(v) is list else "")
def test_a_mistake_is_refused_with_what_is_wrong_and_what_is_allowed(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        composed_study = composed(*overrides)
        from orchestrator.registries import searches

        searches.build(composed_study.search)
    assert len(str(caught.value)) < 600


def test_no_name_may_leave_the_folder_of_studies(tmp_path: Path) -> None:
    for name in ("..", "a/b", "a\\b", "a b", "-x", "x\n"):
        data = config.compose([]) | {"name": name}
        with pytest.raises(ValueError, match="name becomes a folder"):
            config.study(data)


def test_rows_are_grouped_by_label_column_or_number_of_prompts() -> None:
    for text, value in (("null", None), ("label", "label"), ("50", 50)):
        assert config.study(config.compose(["study=tiny", f"group_by={text}"])).group_by == value


@pytest.mark.parametrize(
    ("value", "message"), [("true", "must be null, label"), ("1", "at least 2"), ("0.5", "got 0.5")]
)
def test_groups_that_make_no_sense_are_refused(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"group_by .*{message}"):
        config.study(config.compose(["study=tiny", f"group_by={value}"]))


def test_two_prompt_files_are_refused(solvus: Any, tmp_path: Path) -> None:
    from tests.tasks import tiny_pipelines as tiny

    tiny.stable_diffusion(tmp_path / "sd")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("x\n")
    argv = ["model=diffusers", f"model.path={tmp_path / 'sd'}", f"prompts={tmp_path / 'a.txt'}", "metrics=[]"]
    refused = solvus("plan", *argv, f"model.prompts={tmp_path / 'b.txt'}", f"root={tmp_path}")
    assert refused.code == 2 and "name two files. Leave one out" in refused.err
    assert solvus("plan", *argv, f"model.prompts={tmp_path / 'a.txt'}", f"root={tmp_path}").code == 0
