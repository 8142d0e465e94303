"""Rows that a network spoils are set aside with their step; the rest of the trial stands."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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
    (trial,) = launch(make_study(recipe=gmm)).trials
    assert trial.state == "failed" and "is not finite. The solver diverged" in trial.reason


def test_the_error_travels_between_processes() -> None:
    error = NotFinite({7: "step 1", 9: "step 2"}, "abc")
    again = pickle.loads(pickle.dumps(error))
    assert (again.rows, str(again)) == (error.rows, "sample 7 of abc is not finite: step 1, and 1 more.")
