"""Rows that a network spoils are set aside with their step; the rest of the trial stands."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import rows
from tasks.models.gmm import MixtureDenoiser
from tasks.not_finite import NotFinite
from tasks.run import generate


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 5 of every batch of 16 is not a number from t=0.6 on."""
    denoise = MixtureDenoiser.denoise

    def broken(self: Any, x: Any, t: Any, cond: Any = None) -> Any:
        answer = denoise(self, x, t, cond).clone()
        if float(t) < 0.6:
            answer[5] = math.nan
        return answer

    monkeypatch.setattr(MixtureDenoiser, "denoise", broken)


def test_a_row_that_the_network_spoils_is_set_aside_with_its_step(
    make_study: Callable, launch: Callable, gmm: Any, spoilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gmm.override({"times.num_steps": 4, "batch_size": 16})
    done = launch(make_study(recipe=made))
    (trial,) = done.trials
    assert trial.state == "degraded"
    assert list(trial.quarantined) == [5, 21]
    assert "step 3 of 4 (t=0.5, evaluation 3)" in trial.quarantined[5]
    found = np.concatenate([rows.samples(t, made.parts.model.shape) for t in done.store.read("rows", made.key, 6, 21)])
    monkeypatch.undo()
    np.testing.assert_array_equal(found, generate(made, 6, 21)["x0"])


def test_a_trial_in_which_every_row_is_spoilt_fails(
    make_study: Callable, launch: Callable, gmm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MixtureDenoiser, "denoise", lambda self, x, t, cond=None: x * math.nan)
    done = launch(make_study(recipe=gmm, shard_size=16))
    (trial,) = done.trials
    assert trial.state == "failed" and not trial.quarantined and done.store.quarantined(gmm.key) == {}
    assert (
        f"none of its {trial.num_samples} samples is left. Sample 0: not finite: the network's answer at step 1 of"
        in (trial.reason)
    )
    assert "The network's first answer is spoilt already: check its weights" in trial.reason


@pytest.mark.parametrize(("batch_size", "shard_size"), [(16, 32), (16, 8), (1, 1), (2, 1)])
def test_rows_are_set_aside_with_their_steps_whatever_the_shards(
    make_study: Callable, launch: Callable, gmm: Any, monkeypatch: pytest.MonkeyPatch, batch_size: int, shard_size: int
) -> None:
    """A whole shard may be lost while the trial stands."""
    denoise = MixtureDenoiser.denoise

    def broken(self: Any, x: Any, t: Any, cond: Any = None) -> Any:
        answer = denoise(self, x, t, cond).clone()
        if 0.4 < float(t) < 0.6:
            answer[x[:, 0] > 0] = math.nan
        return answer

    monkeypatch.setattr(MixtureDenoiser, "denoise", broken)
    made = gmm.override({"times.num_steps": 4, "batch_size": batch_size})
    (trial,) = launch(make_study(recipe=made, num_samples=32, shard_size=shard_size)).trials
    assert trial.state == "degraded" and 8 < len(trial.quarantined) < 24
    assert {why[:57] for why in trial.quarantined.values()} == {
        "not finite: the network's answer at step 3 of 4 (t=0.5, e"
    }


def test_a_row_that_only_its_decoding_spoils_is_set_aside_as_such(
    make_study: Callable, launch: Callable, gmm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Any, x0: Any, cond: Any = None) -> Any:
        return torch.where(-x0[:, :1] < share, math.inf, x0)

    monkeypatch.setattr(MixtureDenoiser, "decode", decode)
    share = 0.0
    (trial,) = launch(make_study(recipe=gmm, shard_size=16)).trials
    assert trial.state == "degraded"
    assert set(trial.quarantined.values()) == {"not finite: its decoding, though its state before was finite"}
    share = math.inf
    (trial,) = launch(make_study(recipe=gmm.override({"seed": 1}), name="other")).trials
    assert trial.state == "failed"
    assert "its state before was finite. Only decoding fails: fetch the decoder's weights again" in trial.reason


def test_a_row_that_a_solver_spoils_after_finite_answers_is_set_aside_as_such(
    make_study: Callable, launch: Callable, gmm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.solvers.ddim import DDIM

    step = DDIM.step

    def broken(self: Any, model: Any, state: Any, t: Any, s: Any, noise: Any) -> Any:
        found = step(self, model, state, t, s, noise)
        return replace(found, x=torch.where(found.x[:, :1] > 0, math.inf, found.x)) if float(s) == 0 else found

    monkeypatch.setattr(DDIM, "step", broken)
    (trial,) = launch(make_study(recipe=gmm.override({"solver": "ddim"}))).trials
    assert trial.state == "degraded"
    assert set(trial.quarantined.values()) == {"not finite: its state, though every answer of the network was finite"}


def test_the_error_travels_between_processes() -> None:
    error = NotFinite({7: "step 1", 9: "step 2"}, "abc")
    again = pickle.loads(pickle.dumps(error))
    assert (again.rows, str(again)) == (error.rows, "sample 7 of abc is not finite: step 1, and 1 more.")
