"""What the embedded models reach: the numbers that the studies stand on."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest

from tasks import registry
from tasks.checkpoint import WEIGHTS
from tasks.moments import Moments, frechet_distance, frechet_influence
from tasks.recipe import Recipe
from tasks.run import generate, score

CLASSIFIER = {"name": "classifier"}


@lru_cache(maxsize=1)
def reference() -> Moments:
    images, labels = registry.models.build("digits").reference()
    return Moments.of(score(CLASSIFIER, images, labels, 0, 256, "cpu"))


@lru_cache(maxsize=16)
def distance(model: str, solver: str, times: str, nfe: int, count: int) -> tuple[float, float, float]:
    """Fréchet distance, its standard error, class accuracy."""
    base = Recipe({"name": model}, {"name": "ddim"}, {"name": "uniform"}, {"name": "none"}, {"name": "single"})
    recipe = base.completed().override({"solver": solver, "times": times, "nfe": nfe})
    columns = generate(recipe, 0, count)
    features = score(CLASSIFIER, columns["x0"], columns["label"], 0, 256, "cpu")
    right = score({"name": "class_correct"}, columns["x0"], columns["label"], 0, 256, "cpu")
    m, r = Moments.of(features), reference()
    value = frechet_distance(m.mean, m.covariance, r.mean, r.covariance)
    effects = frechet_influence(features, m, r.mean, r.covariance)
    return value, float(effects.std() / np.sqrt(count)), float(right.mean())


@pytest.mark.parametrize("model", ["digits", "digits_flow"])
def test_conditional_samples_are_the_digits_that_were_asked_for(model: str) -> None:
    assert distance(model, "dpmpp_2m", "quadratic", 20, 1024)[2] >= 0.95


@pytest.mark.parametrize("model", ["digits", "digits_flow"])
def test_the_frechet_distance_falls_at_least_fourfold_from_three_to_twenty_steps(model: str) -> None:
    few = distance(model, "dpmpp_2m", "quadratic", 3, 1024)[0]
    many = distance(model, "dpmpp_2m", "quadratic", 20, 1024)[0]
    assert few >= 4 * many


def test_the_frechet_distance_does_not_rise_again_towards_a_hundred_steps() -> None:
    twenty, error_a, _ = distance("digits", "dpmpp_2m", "quadratic", 20, 1024)
    hundred, error_b, _ = distance("digits", "dpmpp_2m", "quadratic", 100, 1024)
    assert hundred <= twenty + 1.96 * (error_a**2 + error_b**2) ** 0.5


@pytest.mark.parametrize("name", ["digits", "digits_dit", "digits_flow", "digits_classifier"])
def test_every_embedded_model_says_how_it_was_made_and_its_loss_fell(name: str) -> None:
    record = json.loads((WEIGHTS / name / "training.json").read_text())
    assert record["command"].startswith(f"solvus train {name} ") and record["seed"] == 0
    losses = [loss for _, loss in record["loss_curve"]]
    assert losses[-1] < 0.5 * losses[0]
    files = [path for path in (WEIGHTS / name).rglob("*.safetensors")]
    assert files and all(path.stat().st_size <= 5e6 for path in files)


def test_the_classifier_knows_digits_that_it_never_saw() -> None:
    record = json.loads((WEIGHTS / "digits_classifier" / "training.json").read_text())
    assert record["held_out_accuracy"] >= 0.98
    import torch

    from tasks.classifier import classify
    from tasks.data import digits

    test = digits.held_out()
    found = classify(torch.from_numpy(digits.images()[test])).argmax(-1).numpy()
    assert (found == digits.labels()[test]).mean() == pytest.approx(record["held_out_accuracy"], abs=1e-4)


@pytest.mark.parametrize("name", ["digits", "digits_flow"])
def test_training_makes_a_model_that_loads_and_samples(name: str, tmp_path: object) -> None:
    from pathlib import Path

    from tasks.training import digits

    folder = Path(str(tmp_path)) / name
    record = digits.train(name, folder, steps=6, batch_size=32, seed=1, report=lambda line: None)
    assert len(record["loss_curve"]) == 6
    recipe = Recipe({"name": name, "path": str(folder)}, {"name": "ddim"}, {"name": "uniform", "num_steps": 2},
                    {"name": "none"}, {"name": "single"}, batch_size=8).completed()  # fmt: skip
    recipe.check()
    assert generate(recipe, 0, 8)["x0"].shape == (8, 1, 8, 8)
