"""Ray decides where and nothing else: the same rows, the same errors, and a lost worker costs only its task."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from orchestrator import rows, telemetry
from orchestrator.adapters.ray_executor import RayExecutor, RayPool, _Job
from orchestrator.adapters.ray_rewards import _HELD, RewardActor, ServedReward
from orchestrator.plan import ARTIFACTS
from orchestrator.ports import ExecutorLost, WorkerLost
from orchestrator.store import CorruptShard, Store
from orchestrator.study import Study
from orchestrator.worker import perform
from tasks import registry
from tasks.recipe import Recipe
from tests.tasks import tiny_weights

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def one() -> Iterator[Any]:
    """A pool of one worker that starts Ray and ends it."""
    assert not ray.is_initialized()
    pool = RayExecutor(workers=1).start()
    yield pool
    pool.close()
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def two(one: Any) -> Iterator[Any]:
    """A pool of two workers that joins it."""
    pool = RayExecutor(workers=2, cpus=0.0).start()
    yield pool
    pool.close()
    assert ray.is_initialized()


def samples(study: Study, recipe: Recipe) -> np.ndarray:
    tables = Store(study.root).read("rows", recipe.key, 0, study.num_samples)
    return np.concatenate([rows.samples(table, recipe.parts.model.shape) for table in tables])


def kills_its_worker(folder: Path, times: int, work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``work``, but the first so many calls of all take their process with them."""

    def fragile(task: Any) -> Any:
        for attempt in range(times):
            try:
                (folder / f"attempt-{attempt}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return work(task)

    return fragile


class Through:
    """An executor that runs another function on the same workers."""

    def __init__(self, pool: Any, function: Callable[[Any], Any]) -> None:
        self.slots, self._pool, self._function = pool.slots, pool, function

    def submit(self, function: Callable[[Any], Any], task: Any) -> Future:
        return self._pool.submit(self._function, task)

    def close(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("workers", "model", "size"), [("one", "gmm", 16), ("two", "gmm", 16), ("two", "gmm", 23), ("two", "digits", 23)]
)
def test_rows_and_values_are_those_of_this_process_bit_for_bit(
    make_study: Callable, launch: Callable, tmp_path: Path, request: pytest.FixtureRequest,
    workers: str, model: str, size: int,
) -> None:  # fmt: skip
    recipe = Recipe(model, "heun", "uniform", "none", "single", batch_size=16).completed()  # type: ignore[arg-type]
    recipe = recipe.override({"times.num_steps": 2})
    here = make_study(recipe=recipe, num_samples=80, shard_size=40, root=str(tmp_path / "here"))
    there = make_study(recipe=recipe, num_samples=80, shard_size=size, root=str(tmp_path / "there"))
    local = launch(here)
    remote = launch(there, request.getfixturevalue(workers))
    assert remote.trials[0].state == "complete", remote.trials[0].reason
    assert np.array_equal(samples(here, recipe), samples(there, recipe))
    assert (remote.trials[0].values, remote.trials[0].errors) == (local.trials[0].values, local.trials[0].errors)
    assert remote.ledger.spent["rows"] == 80 and remote.ledger.spent["nfe"] == local.ledger.spent["nfe"]


@pytest.mark.parametrize(
    ("times", "costs", "made"),
    [({"name": "dp_steps", "num_fine": 10, "num_samples": 8}, [80, 80], 80),
     ({"name": "optimal_steps", "num_fine": 10, "stride": 2, "num_samples": 8}, [120, 160], 280)],
    ids=["dp_steps", "optimal_steps"],
)  # fmt: skip
def test_calibrations_run_on_the_workers_once_and_give_the_rows_of_this_process(
    make_study: Callable, launch: Callable, gmm: Recipe, tmp_path: Path, two: Any, times: Any, costs: Any, made: int
) -> None:
    recipe = gmm.override({"times": times, "initial": "teleport"})
    search = {"name": "grid", "space": {"times.num_steps": [2, 3]}}
    here = launch(make_study(recipe=recipe, search=search, root=str(tmp_path / "here")))
    study = make_study(recipe=recipe, search=search, root=str(tmp_path / "there"))
    there = launch(study, two)
    assert [trial.state for trial in there.trials] == ["complete"] * 2, there.trials[0].reason
    assert [trial.values for trial in there.trials] == [trial.values for trial in here.trials]
    for trial in there.trials:
        key = trial.recipe.calibrations[0].key
        local, remote = (done.store.get_arrays(ARTIFACTS, key) for done in (here, there))
        assert local.keys() == remote.keys() and all(np.array_equal(local[k], remote[k]) for k in local)
    assert [trial.cost["calibration_nfe"] for trial in there.trials] == costs
    assert there.ledger.spent["nfe"] == here.ledger.spent["nfe"] == made + 32 * (2 + 3)
    assert launch(study, two).ledger.spent["nfe"] == 0


def test_companion_rows_are_made_on_the_workers_once_and_give_the_values_of_this_process(
    make_study: Callable, launch: Callable, tmp_path: Path, two: Any
) -> None:
    search, metrics = {"name": "grid", "space": {"nfe": [3, 5, 8]}}, [{"name": "trajectory", "num_steps": 20}]
    here = launch(make_study(metrics=metrics, search=search, root=str(tmp_path / "here")))
    there = launch(make_study(metrics=metrics, search=search, root=str(tmp_path / "there"), shard_size=11), two)
    assert [(trial.state, trial.reason) for trial in there.trials] == [("complete", "")] * 3
    assert [(t.values, t.errors) for t in there.trials] == [(t.values, t.errors) for t in here.trials]
    assert there.ledger.spent["nfe"] == here.ledger.spent["nfe"] == 32 * (20 + 3 + 5 + 8)


def test_results_come_back_each_to_its_own_future(two: Any) -> None:
    futures = [two.submit(lambda n: n * n, n) for n in range(20)]
    assert [future.result(30) for future in futures] == [n * n for n in range(20)]


def test_a_worker_is_a_long_lived_process(one: Any) -> None:
    assert len({one.submit(lambda _: os.getpid(), None).result(30) for _ in range(5)} - {os.getpid()}) == 1


@pytest.mark.parametrize("error", [ValueError("no such thing"), CorruptShard("bits flipped"), ZeroDivisionError("0/0")])
def test_an_exception_is_not_retried_and_surfaces_with_its_own_type(one: Any, tmp_path: Path, error: Exception) -> None:
    def fails(folder: Path) -> None:
        with open(folder / "calls", "a") as file:
            file.write("called\n")
        raise error

    future = one.submit(fails, tmp_path)
    with pytest.raises(type(error), match=str(error)):
        future.result(30)
    assert (tmp_path / "calls").read_text() == "called\n"
    assert one.submit(lambda n: n + 1, 1).result(30) == 2  # the worker goes on


def test_a_failing_shard_fails_its_trial_and_the_others_continue(
    make_study: Callable, launch: Callable, two: Any
) -> None:
    def fails_once(shard: Any) -> Any:
        if shard.start == 16:
            raise RuntimeError("the device fell off")
        return perform(shard)

    done = launch(make_study(num_samples=48), Through(two, fails_once))
    assert done.trials[0].state == "failed"
    assert done.trials[0].reason.endswith("/16-32 failed: RuntimeError: the device fell off")
    assert [(r.start, r.stop) for r in done.store.committed("rows", done.trials[0].recipe.key)] == [(0, 16), (32, 48)]


def test_a_killed_workers_task_runs_again_and_the_study_completes(
    make_study: Callable, launch: Callable, one: Any, tmp_path: Path
) -> None:
    done = launch(make_study(num_samples=48), Through(one, kills_its_worker(tmp_path, 1, perform)))
    assert (tmp_path / "attempt-0").exists()
    assert done.trials[0].state == "complete", done.trials[0].reason
    whole = launch(make_study(num_samples=48, root=str(tmp_path / "undisturbed")))
    assert done.trials[0].values == whole.trials[0].values
    assert done.store.verify()[1] == []


def test_a_task_that_always_kills_its_worker_is_given_up_after_the_losses_that_are_allowed(
    one: Any, tmp_path: Path
) -> None:
    pool = RayExecutor(workers=1, cpus=0.0, max_losses=2).start()
    try:
        future = pool.submit(kills_its_worker(tmp_path, 99, lambda _: None), None)
        with pytest.raises(WorkerLost, match="died 2 times"):
            future.result(60)
        assert len(list(tmp_path.iterdir())) == 2
        assert pool.submit(lambda n: n + 1, 1).result(60) == 2
    finally:
        pool.close()


class Unreachable:
    """In place of Ray: a cluster that no longer answers, or one whose objects are always lost."""

    class exceptions:  # as Ray names them
        class RayActorError(Exception): ...

        class WorkerCrashedError(Exception): ...

        class ObjectLostError(Exception): ...

    def cluster_resources(self) -> Any:
        raise ConnectionError("the head is gone")


def test_a_pool_that_breaks_ends_every_task_instead_of_leaving_it_waiting() -> None:
    pool = a_pool(RayExecutor(workers=0, silence_s=1.2))
    thread = threading.Thread(target=pool._own)
    waiting = pool.submit(print, None)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    for future in (waiting, pool.submit(print, None)):
        with pytest.raises(ExecutorLost, match="ConnectionError: the head is gone"):
            future.result(1)


def test_a_task_whose_objects_are_lost_is_given_up_after_the_losses_that_are_allowed() -> None:
    pool = a_pool(RayExecutor(max_losses=3))
    job = _Job(print, None, Future())
    worker = SimpleNamespace(jobs=[job])
    lost: Future = Future()
    lost.set_exception(Unreachable.exceptions.ObjectLostError())
    for losses in (1, 2, 3):
        worker.jobs = [job]
        pool._finished(worker, job, None, None, lost)  # type: ignore[arg-type]
        assert job.losses == losses and job.future.done() == (losses == 3)
    assert isinstance(job.future.exception(), WorkerLost) and pool._retried == 2


def a_pool(spec: RayExecutor) -> RayPool:
    """A pool without workers on a cluster that is gone; its thread is not started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayPool, "_add", lambda *_: None)
        patch.setattr(threading.Thread, "start", lambda *_: None)
        patch.setattr("ray.is_initialized", lambda: True)
        pool = RayPool(spec)
    telemetry.close_sink(pool._metrics)
    pool._ray = Unreachable()
    return pool


@pytest.mark.parametrize("fields", [{"workers": -1}, {"max_losses": 0}, {"cpus": -1.0}, {"gpus": -0.5}])
def test_impossible_resources_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="executor"):
        RayExecutor(**fields)


# --- rewards in an actor of their own --------------------------------------------------------------------------------


def test_a_reward_in_an_actor_of_its_own_gives_the_rows_of_this_process_bit_for_bit_and_scores_nothing_twice(
    make_study: Callable, launch: Callable, tmp_path: Path, one: Any
) -> None:
    best = {"name": "best_of_n", "n": 4}
    recipe = Recipe("digits", "euler", "uniform", "none", best, "class_log_prob", batch_size=16).completed()  # type: ignore[arg-type]
    recipe = recipe.override({"times.num_steps": 2})
    fields: dict[str, Any] = {"recipe": recipe, "num_samples": 8, "shard_size": 8}
    here = launch(make_study(**fields, root=str(tmp_path / "here")))
    options = {"num_cpus": 0}
    pool = RayExecutor(workers=1, cpus=0.0, reward_actor=options).start()
    try:
        for name in ("there", "again"):
            study = make_study(**fields, root=str(tmp_path / name))
            there = launch(study, pool)
            assert there.trials[0].state == "complete", there.trials[0].reason
            assert np.array_equal(
                samples(study, recipe), samples(make_study(**fields, root=str(tmp_path / "here")), recipe)
            )
            assert there.trials[0].values == here.trials[0].values
        counts = ray.get(ServedReward(recipe.reward, (), options).actor().counts.remote())  # type: ignore[arg-type]
        assert (counts["scored"], counts["reused"]) == (32, 32)
    finally:
        _HELD.clear()
        pool.close()


def test_a_served_reward_reports_the_seconds_and_the_reuse_of_its_actor_and_leaves_shared_arrays_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from orchestrator.adapters import ray_rewards
    from tasks import registry

    class Handle:
        """An actor without Ray: what it is given may not be written, as what Ray hands over."""

        def __init__(self, spec: Any) -> None:
            self._actor, self.score = ray_rewards.RewardActor(spec), self

        def remote(self, samples: Any, cond: Any, indices: Any) -> Any:
            for array in (samples, cond):
                array.flags.writeable = False
            return self._actor.score(samples, cond)

    monkeypatch.setattr(ray, "get", lambda answer: answer)
    samples, cond = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    for name, reused in (("class_log_prob", 6), ("ink", 0)):  # what is cheap is not looked up
        spec = registry.rewards.complete(name)
        served, handle = ray_rewards.ServedReward(spec, (), {}), Handle(spec)
        monkeypatch.setattr(served, "actor", lambda handle=handle: handle)
        plain = registry.rewards.build(spec)(samples, cond)
        assert torch.equal(served(samples.clone(), cond.clone()), plain)
        seconds = served.seconds
        assert seconds > 0 and served.reused == 0
        assert torch.equal(served(samples.clone(), cond.clone()), plain) and served.reused == reused
        assert (served.seconds > seconds) == (reused == 0)


LABELS = torch.tensor([1, 0, 1])
PICTURES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def clip_score(**more: Any) -> Any:
    return registry.rewards.complete({"name": "clip_score", "path": str(tiny_weights.clip())} | more)


@pytest.mark.slow  # the actor's process imports transformers
def test_an_actor_reads_the_model_s_prompts_in_an_environment_of_its_own(one: Any, tmp_path: Path) -> None:
    """The environment is another Python, with a package that this process does not have."""
    python = other_python(tmp_path / "clash")
    texts = ("a red fox", "the sea")
    here = registry.rewards.build(clip_score()).reading(texts)
    try:
        served = ServedReward(clip_score(), texts, {"num_cpus": 0, "env": {"py_executable": str(python)}})
        assert torch.equal(served(PICTURES, LABELS), here(PICTURES, LABELS).detach())
        find = lambda actor: (sys.executable, importlib.import_module("clashing").VERSION)  # noqa: E731
        assert ray.get(served.actor().__ray_call__.remote(find)) == (str(python), "2.0")
        assert importlib.util.find_spec("clashing") is None
    finally:
        _HELD.clear()


def test_what_an_actor_is_asked_says_whose_prompts_they_are() -> None:
    own = clip_score(prompts=["a cat", "two dogs"])
    names = [ServedReward(clip_score(), texts, {}).name for texts in (("a cat",), ("a house",))]
    assert len({*names, ServedReward(own, (), {}).name}) == 3  # the same labels mean other texts
    ink = registry.rewards.complete("ink")
    assert ServedReward(ink, ("a cat",), {}).name == ServedReward(ink, (), {}).name
    assert hasattr(ServedReward(own, (), {}), "at") and not hasattr(ServedReward(clip_score(), (), {}), "at")
    actor, wanted = RewardActor(own), registry.rewards.build(own).at(LABELS)(PICTURES, None).detach().numpy()
    for _ in range(2):
        assert np.array_equal(actor.score(PICTURES.numpy(), None, LABELS.numpy())[0], wanted)
    assert actor.counts()["scored"] == actor.counts()["reused"] == 3
    moved, *_ = actor.score(PICTURES.numpy(), None, LABELS.numpy() - 1)  # the same pictures in other rows
    assert not np.array_equal(moved, wanted)


def other_python(folder: Path) -> Path:
    """An interpreter that sees our packages behind one of its own, made without a network."""
    venv.EnvBuilder(with_pip=False).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "clashing.py").write_text("VERSION = '2.0'")
    (site / "ours.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages") or not p))
    return folder / "bin" / "python"


def test_an_actor_with_options_that_mean_nothing_is_refused() -> None:
    for options, message in (
        ({"metrics": 1}, "metrics must be true or false"),
        ({"gpus": 1}, "unknown field"),
        ({"num_cpus": -1}, "at least 0"),
        ({"env": 3}, "runtime"),
    ):
        with pytest.raises(ValueError, match=message):
            RayExecutor(reward_actor=options)
