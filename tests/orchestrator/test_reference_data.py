"""Samples of saved models are compared with their users' data: found before sampling, read once, keyed by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import measure
from orchestrator.api import run
from tasks.checkpoint import WEIGHTS, digits_reference
from tests.tasks import tiny_pipelines as tiny

Solvus = Callable[..., Any]
UNET = ["model=unet", f"model.path={WEIGHTS / 'digits'}", "nfe=4", "num_samples=80", "batch_size=32", "tracker=none"]


def levels() -> np.ndarray:
    images, _ = digits_reference()
    return np.round((images[:, 0] + 1) * 127.5).astype(np.uint8)


def values(root: Path, name: str, *more: str) -> dict[str, Any]:
    (row,) = run(*UNET, f"root={root}", f"name={name}", *more).trials().to_pylist()
    assert row["state"] == "complete", row["reason"]
    return {key.removeprefix("value/"): value for key, value in row.items() if key.startswith("value/quality")}


def test_pictures_of_the_digits_give_the_values_of_the_digits(tmp_path: Path) -> None:
    np.save(tmp_path / "digits.npy", levels())
    metrics = "metrics=[{name: kid, features: identity}, frechet, diversity, prdc, {name: memorisation, level: 0.01}]"
    built_in = values(tmp_path, "a", metrics, "model.data=digits")
    mine = values(tmp_path, "b", metrics, f"model.data={tmp_path / 'digits.npy'}")
    assert set(mine) == set(built_in) and len(mine) > 6
    for name, value in built_in.items():  # up to the rounding to 8 bits
        assert mine[name] == pytest.approx(value, rel=0.05, abs=2e-3), name


def test_other_data_at_the_same_place_give_another_value_from_the_same_rows(tmp_path: Path) -> None:
    place = tmp_path / "digits.npy"
    np.save(place, levels())
    more = ("metrics=[kid]", f"model.data={place}")
    first = values(tmp_path, "a", *more)
    assert values(tmp_path, "a", *more) == first
    np.save(place, levels()[:900] // 2)
    again = run(*UNET, f"root={tmp_path}", "name=a", *more)
    assert again.trials()["value/quality/kid"][0].as_py() > first["quality/kid"] + 0.1
    assert again.results.state()["summary"]["samples_made"] == 0


def test_statistics_of_a_file_stand_for_the_data(tmp_path: Path) -> None:
    features = {"name": "classifier"}
    store = measure.Store(tmp_path)
    found = measure._scored(features, *digits_reference(), store).astype(np.float64)
    file = tmp_path / "stats.npz"
    np.savez(file, mu=found.mean(0), sigma=np.cov(found, rowvar=False))
    plain = values(tmp_path, "a", "metrics=[frechet, frechet_infinity]", "model.data=digits", "num_samples=256")
    both = ", ".join(f"{{name: {name}, statistics: {file}}}" for name in ("frechet", "frechet_infinity"))
    mine = values(tmp_path, "b", f"metrics=[{both}]", "num_samples=256")
    assert mine == pytest.approx(plain, rel=1e-6)


def test_a_pipeline_is_compared_with_a_folder(tmp_path: Path) -> None:
    tiny.dit(tmp_path / "dit")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "data.npy", pictures)
    (row,) = (
        run(
            "model=diffusers",
            f"model.path={tmp_path / 'dit'}",
            f"model.data={tmp_path / 'data.npy'}",
            "nfe=2",
            "num_samples=8",
            "batch_size=4",
            "tracker=none",
            "metrics=[{name: kid, features: identity}]",
            f"root={tmp_path}",
            "name=p",
        )  # fmt: skip
        .trials()
        .to_pylist()
    )
    assert row["state"] == "complete" and np.isfinite(row["value/quality/kid"])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["metrics=[kid]"], "brings no data to compare samples with. Set model.data"),
        (["metrics=[diversity]"], "brings no data"),
        (["metrics=[kid]", "model.data=nowhere"], "is no folder of pictures"),
        (["metrics=[{name: frechet, statistics: nowhere.npz}]"], "is no .npz file with mu and sigma"),
    ],
)
def test_what_is_missing_is_told_before_sampling(solvus: Solvus, tmp_path: Path, more: list[str], why: str) -> None:
    for verb in ("plan", "run"):
        refused = solvus(verb, *UNET, "num_samples=200", f"root={tmp_path}", "name=x", *more)
        assert refused.code == 2 and why in refused.err, refused.err
    assert not list((tmp_path / "store" / "rows").glob("*"))


def test_statistics_of_other_features_are_refused(solvus: Solvus, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    metric = f"metrics=[{{name: frechet, statistics: {tmp_path / 's.npz'}}}]"
    refused = solvus("plan", *UNET, "num_samples=200", f"root={tmp_path}", metric)
    assert refused.code == 2 and "is of 3 features, but metric.features gives" in refused.err


def test_a_value_does_not_outlive_the_revision_of_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.metrics.kid import KID

    first = values(tmp_path, "a", "metrics=[kid]", "model.data=digits")
    compute = KID.compute
    monkeypatch.setattr(KID, "compute", lambda *a: {name: value + 100 for name, value in compute(*a).items()})
    assert values(tmp_path, "a", "metrics=[kid]", "model.data=digits") == first
    monkeypatch.setattr(KID, "revision", "2", raising=False)
    assert values(tmp_path, "a", "metrics=[kid]", "model.data=digits")["quality/kid"] == first["quality/kid"] + 100
