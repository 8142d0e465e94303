"""Rows as tables: what goes in comes out, and the neighbours' tools see pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestrator import rows
from orchestrator.plan import Shard
from orchestrator.store import Store
from orchestrator.worker import perform
from tasks.recipe import Recipe
from tasks.registry import rewards

CONSTANTS = {"seed": 3, "recipe": "abc", "device": "cpu"}


def columns(x0: np.ndarray) -> dict[str, np.ndarray]:
    count = len(x0)
    return {
        "sample_id": np.arange(5, 5 + count),
        "label": np.arange(count) % 10,
        "nfe": np.full(count, 4, dtype=np.int32),
        "seconds": np.full(count, 0.5, dtype=np.float32),
        "x0": x0,
        "candidate_rewards": np.arange(2.0 * count).reshape(count, 2),
    }


def images(shape: tuple[int, ...] = (6, 1, 8, 8)) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def digits() -> Recipe:
    """One DDIM step of the embedded digits model."""
    recipe = Recipe("digits", "ddim", "uniform", "none", "single", batch_size=16).completed()  # type: ignore[arg-type]
    return recipe.override({"times.num_steps": 1})


def shard(recipe: Recipe, root: Path, made: bool, *scorers: str) -> Shard:
    return Shard(asdict(recipe), 3, 13, made, tuple(rewards.complete(name) for name in scorers), str(root), recipe.key)


@pytest.mark.parametrize(
    ("kind", "x0"),
    [
        ("image", images()),
        ("image", images((4, 3, 4, 6))),
        ("vector", images((6, 2))),
        ("vector", images((3, 5000))),
        ("tokens", np.arange(12).reshape(3, 4)),
    ],
)
def test_samples_and_columns_come_back_as_they_were(kind: str, x0: np.ndarray) -> None:
    given = columns(x0)
    table = rows.to_table(given, kind, CONSTANTS)
    assert np.array_equal(rows.samples(table, x0.shape[1:]), x0)
    assert rows.to_numpy(table["x0"]).dtype == x0.dtype
    for name in ("sample_id", "label", "nfe", "seconds", "candidate_rewards"):
        assert np.array_equal(rows.to_numpy(table[name]), given[name])
        assert rows.to_numpy(table[name]).dtype == given[name].dtype
    assert {name: set(table[name].to_pylist()) for name in CONSTANTS} == {n: {v} for n, v in CONSTANTS.items()}
    assert ("image" in table.column_names) == (kind == "image")


def test_a_slice_of_a_table_gives_the_samples_of_the_slice() -> None:
    x0 = images()
    table = rows.to_table(columns(x0), "image", CONSTANTS).slice(2, 3)
    assert np.array_equal(rows.samples(table, (1, 8, 8)), x0[2:5])
    joined = pa.concat_tables([table, rows.to_table(columns(x0), "image", CONSTANTS)])
    assert np.array_equal(rows.samples(joined, (1, 8, 8)), np.concatenate([x0[2:5], x0]))


def through_png(image: np.ndarray) -> np.ndarray:
    """An image as it comes back from a table that keeps pictures only."""
    table = rows.to_table(columns(image[None]), "image", CONSTANTS)
    return rows.decode_png(table["image"][0].as_py()["bytes"])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_a_png_keeps_an_image_to_half_of_an_eighth_bit(shape: tuple[int, ...]) -> None:
    (image,) = images((1, *shape))
    found = through_png(image)
    assert found.shape == shape and found.dtype == np.float32
    assert np.abs(found - image).max() <= 1 / 255 + 1e-6
    assert np.array_equal(through_png(found), found)


def test_a_png_clips_what_lies_outside_and_keeps_both_ends() -> None:
    image = np.array([[[-7.0, -1.0], [1.0, 9.0]]], dtype=np.float32)
    assert through_png(image).tolist() == [[[-1.0, -1.0], [1.0, 1.0]]]


def test_large_images_are_kept_as_pictures_only() -> None:
    x0 = images((1, 1, 65, 64))
    table = rows.to_table(columns(x0), "image", CONSTANTS)
    assert "x0" not in table.column_names
    assert np.abs(rows.samples(table, (1, 65, 64)) - x0).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("values", [np.arange(4.0, dtype=np.float32), np.arange(12.0).reshape(4, 3)])
def test_a_scorers_column_comes_back_with_its_sample_ids(values: np.ndarray) -> None:
    table = rows.column_table(values, 7)
    assert table["sample_id"].to_pylist() == [7, 8, 9, 10]
    assert np.array_equal(rows.to_numpy(table["value"]), values)


def test_two_runs_of_a_shard_store_the_same_table_but_for_the_seconds(digits: Recipe, tmp_path: Path) -> None:
    tables = []
    for name in ("a", "b"):
        perform(shard(digits, tmp_path / name, True))
        (table,) = Store(tmp_path / name).read("rows", digits.key, 3, 13)
        tables.append(table)
    assert tables[0].schema.equals(tables[1].schema, check_metadata=True)
    assert tables[0].drop_columns("seconds").equals(tables[1].drop_columns("seconds"))
    assert {"image", "x0", "label", "nfe", "seed", "recipe", "model_revision", "device", "dtype"} <= set(
        tables[0].column_names
    )


def test_hugging_face_datasets_shows_stored_shards_as_pictures(digits: Recipe, tmp_path: Path) -> None:
    perform(shard(digits, tmp_path / "root", True))
    (path,) = (tmp_path / "root").rglob("*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert isinstance(loaded.features["image"], datasets.Image)
    assert len(loaded) == 10 and [row["label"] for row in loaded] == [i % 10 for i in range(3, 13)]
    (table,) = Store(tmp_path / "root").read("rows", digits.key, 3, 13)
    for row, image in zip(loaded, rows.samples(table, (1, 8, 8)), strict=True):
        assert isinstance(row["image"], Image.Image) and row["image"].size == (8, 8)
        assert np.abs(np.asarray(row["image"]) / 127.5 - 1 - image[0]).max() <= 1 / 255 + 1e-6


def test_every_column_has_a_feature_of_its_own_type() -> None:
    table = rows.to_table(columns(images()), "image", CONSTANTS)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert (features["image"]["_type"], features["nfe"]["dtype"]) == ("Image", "int32")
    assert (features["seconds"]["dtype"], features["recipe"]["dtype"]) == ("float32", "string")
    assert features["candidate_rewards"]["feature"]["dtype"] == "float64"
    assert (features["x0"]["feature"]["dtype"], features["x0"]["length"]) == ("float32", 64)


@pytest.mark.parametrize("kept", [4096, 1])
def test_a_score_is_the_same_whether_made_with_its_rows_or_later(
    digits: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(rows, "MAX_KEPT_SIZE", kept)  # 1: as for images too large to keep their state
    perform(shard(digits, tmp_path / "together", True, "ink"))
    perform(shard(digits, tmp_path / "apart", True))
    perform(shard(digits, tmp_path / "apart", False, "ink"))
    key = digits.column_key(rewards.complete("ink"))
    (together,) = Store(tmp_path / "together").read("columns", key, 3, 13)
    (apart,) = Store(tmp_path / "apart").read("columns", key, 3, 13)
    assert together.equals(apart)
