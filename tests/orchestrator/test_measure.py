"""From rows to values: the same number whoever made the rows, and never one from fewer rows or from NaN."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import measure, rows
from orchestrator.plan import shards
from orchestrator.ports import Proposal
from orchestrator.store import CorruptShard, Store
from orchestrator.worker import perform
from tasks import run
from tasks.intervals import standard_error
from tasks.metrics.frechet import Frechet
from tasks.recipe import Recipe
from tasks.registry import Spec
from tasks.registry import metrics as metric_registry

INK = {"name": "mean_reward", "reward": "ink"}
FRECHET = {"name": "frechet", "features": "identity"}
METRICS = [metric_registry.complete(spec) for spec in (FRECHET, INK, "cost")]


def make(recipe: Recipe, root: Path, start: int, stop: int, size: int, metrics: list[Spec] = METRICS) -> Store:
    store = Store(root)
    for shard in shards(recipe, measure.scorers(metrics), start, stop, size, store):
        perform(shard)
    return store


def test_values_and_errors_do_not_depend_on_shard_sizes_by_a_single_bit(
    gmm: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK", 32)
    found = []
    for size in (7, 16, 50, 1000):
        store = make(gmm, tmp_path / str(size), 5, 105, size)
        found.append(measure.measure(gmm, METRICS, 5, 105, store))
    assert all(other == found[0] for other in found[1:])
    assert (
        set(found[0][0])
        == set(found[0][1])
        == {"quality/frechet", "reward/ink", "cost/nfe", "cost/reward_calls", "cost/decodes"}
    )


def test_chunks_have_fixed_sizes_whatever_the_shards_were(
    gmm: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK", 32)
    store = make(gmm, tmp_path, 0, 100, 13)
    found = list(measure.chunks(gmm, measure.scorers(METRICS), 0, 100, store))
    assert [len(chunk["nfe"]) for chunk in found] == [32, 32, 32, 4]
    assert np.concatenate([chunk["position"] for chunk in found]).tolist() == list(range(100))


def test_values_are_what_the_rows_say(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 64, 16)
    x = np.concatenate([rows.samples(table, (2,)) for table in store.read("rows", gmm.key, 0, 64)]).astype(np.float64)
    ink = (x.mean(axis=1) + 1) / 2
    values, errors = measure.measure(gmm, METRICS, 0, 64, store)
    assert values["reward/ink"] == pytest.approx(ink.mean(), rel=1e-6)
    assert errors["reward/ink"] == pytest.approx(ink.std(ddof=1) / math.sqrt(64), rel=1e-5)
    assert (values["cost/nfe"], errors["cost/nfe"], values["cost/reward_calls"]) == (4.0, 0.0, 0.0)


def test_measured_values_are_kept_and_used_without_reading_rows(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 32, 16)
    first = measure.measure(gmm, METRICS, 0, 32, store)
    shutil.rmtree(tmp_path / "store" / "rows")
    shutil.rmtree(tmp_path / "store" / "columns")
    assert measure.measure(gmm, METRICS, 0, 32, store) == first


def test_kept_values_belong_to_one_range_and_one_set_of_metrics(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 48, 16)
    half, whole = measure.measure(gmm, METRICS, 0, 24, store), measure.measure(gmm, METRICS, 0, 48, store)
    assert half[0]["reward/ink"] != whole[0]["reward/ink"]
    assert set(measure.measure(gmm, METRICS[2:], 0, 48, store)[0]) == {"cost/nfe", "cost/reward_calls", "cost/decodes"}


def test_damaged_kept_values_are_measured_again(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 32, 16)
    first = measure.measure(gmm, METRICS, 0, 32, store)
    (path,) = (tmp_path / "store" / "values").rglob("*.json")
    path.write_text(path.read_text().replace("1", "2"))
    assert measure.measure(gmm, METRICS, 0, 32, store) == first


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_fewer_rows_than_asked_for_are_an_error(gmm: Recipe, tmp_path: Path, kind: str) -> None:
    store = make(gmm, tmp_path, 0, 48, 16)
    for path in (tmp_path / "store" / kind).rglob("0000000016-0000000032.json"):
        path.unlink()
    with pytest.raises((KeyError, ValueError)):
        measure.measure(gmm, METRICS, 0, 48, store)
    assert not list((tmp_path / "store").rglob("values/**/*.json"))


def test_a_damaged_row_file_is_said_to_be_corrupt(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 32, 16)
    path = next((tmp_path / "store" / "rows").rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard):
        measure.measure(gmm, METRICS, 0, 32, store)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error_and_is_not_kept(
    gmm: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    store = make(gmm, tmp_path, 0, 32, 16)
    with monkeypatch.context() as patch:
        patch.setattr(Frechet, "compute", lambda self, summary, reference: {"quality/frechet": bad})
        with pytest.raises(ValueError, match=r"quality/frechet is .*never counts as a result"):
            measure.measure(gmm, METRICS, 0, 32, store)
    assert math.isfinite(measure.measure(gmm, METRICS, 0, 32, store)[0]["quality/frechet"])


def test_pairing_equal_indices_gives_a_smaller_standard_error(gmm: Recipe, tmp_path: Path) -> None:
    other = gmm.override({"solver": "heun", "times.num_steps": 3})
    for recipe in (gmm, other):
        make(recipe, tmp_path, 0, 256, 128)
    store = Store(tmp_path)
    metric = METRICS[0]
    effects = [measure.influences(r, metric, "quality/frechet", 0, 256, store) for r in (gmm, other)]
    difference, paired = measure.paired_difference(*effects)
    errors = [measure.measure(r, METRICS, 0, 256, store)[1]["quality/frechet"] for r in (gmm, other)]
    values = [measure.measure(r, METRICS, 0, 256, store)[0]["quality/frechet"] for r in (gmm, other)]
    assert difference == values[0] - values[1]
    assert [e.rows.std(ddof=1) / 16 for e in effects] == pytest.approx(errors, rel=1e-6)
    assert 0 < paired < 0.5 * math.hypot(*errors)


def test_the_difference_of_a_trial_with_itself_is_zero_without_doubt(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 32, 32)
    effect = measure.influences(gmm, METRICS[0], "quality/frechet", 0, 32, store)
    assert measure.paired_difference(effect, effect) == (0.0, 0.0)


def test_the_reference_is_made_once_for_a_model(gmm: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first = measure.reference(gmm, METRICS[0], store)
    monkeypatch.setattr(Frechet, "reference", lambda *_: pytest.fail("made again"))
    again = measure.reference(Recipe(**asdict(gmm) | {"seed": 5}), METRICS[0], store)
    assert first is not None and again is not None
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(pytest.fail.Exception):
        measure.reference(gmm.override({"model.seed": 1}), METRICS[0], store)


def test_scorers_that_two_metrics_share_are_listed_once() -> None:
    specs = [metric_registry.complete(spec) for spec in (FRECHET, {"name": "kid", "features": "identity"}, INK)]
    assert [spec["name"] for spec in measure.scorers(specs)] == ["identity", "ink"]


def test_two_settings_of_one_scorer_are_refused_instead_of_being_mixed_up() -> None:
    both = [{"name": "mean_reward", "reward": {"name": "measurement", "sigma_y": sigma}} for sigma in (0.1, 0.2)]
    with pytest.raises(ValueError, match="two metrics read scorer measurement with different settings"):
        measure.scorers([metric_registry.complete(spec) for spec in both])
    assert len(measure.scorers([metric_registry.complete(both[0])] * 2)) == 1


def test_clusters_by_a_number_of_prompts_are_rows_whose_indices_agree(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 3, 67, 16)
    values, errors = measure.measure(gmm, METRICS, 3, 67, store, cluster=8)
    plain = measure.measure(gmm, METRICS, 3, 67, store)
    assert values == plain[0]
    plain_effects = measure.influences(gmm, METRICS[0], "quality/frechet", 3, 67, store)
    expected = standard_error(plain_effects.rows, np.arange(3, 67) % 8)
    assert errors["quality/frechet"] == pytest.approx(expected, rel=1e-12)
    assert errors["quality/frechet"] != plain[1]["quality/frechet"]
    grouped = measure.influences(gmm, METRICS[0], "quality/frechet", 3, 67, store, cluster=8)
    assert grouped.value == plain_effects.value and np.array_equal(grouped.rows, plain_effects.rows)
    assert grouped.independent.shape == (8,)
    # Effects have mean zero up to 1 / n.
    assert standard_error(grouped.independent) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("cluster", [None, 8])
def test_rows_in_quarantine_leave_the_others_paired(gmm: Recipe, tmp_path: Path, cluster: int | None) -> None:
    other = gmm.override({"seed": gmm.seed, "solver": "heun", "times.num_steps": 3})
    for recipe in (gmm, other):
        make(recipe, tmp_path, 3, 67, 16)
    store = Store(tmp_path)

    def found(recipe: Recipe) -> measure.Influences:
        return measure.influences(recipe, METRICS[0], "quality/frechet", 3, 67, store, cluster)

    _, whole = measure.paired_difference(found(gmm), found(other))
    _, apart = measure.paired_difference(found(gmm), found(gmm))
    store.quarantine(gmm.key, 5, "it killed its worker")
    store.quarantine(other.key, 60, "it killed its worker")
    lacking = found(gmm)
    assert math.isnan(lacking.rows[2]) and np.isfinite(lacking.rows).sum() == 63
    difference, error = measure.paired_difference(lacking, found(other))
    assert apart == 0.0 and error == pytest.approx(whole, rel=0.1)
    assert difference == lacking.value - found(other).value


def test_clusters_by_label_are_the_labels(tmp_path: Path) -> None:
    recipe = Recipe(
        {"name": "gmm", "labels": True},
        "ddim",
        "uniform",
        "none",
        "single",
        batch_size=16,  # type: ignore[arg-type]
    ).completed()
    store = make(recipe, tmp_path, 0, 64, 64, [METRICS[1]])
    labels = [recipe.label(i) for i in range(64)]
    effects = measure.influences(recipe, METRICS[1], "reward/ink", 0, 64, store).rows
    errors = measure.measure(recipe, [METRICS[1]], 0, 64, store, cluster="label")[1]
    assert errors["reward/ink"] == pytest.approx(standard_error(effects, np.array(labels)), rel=1e-9)


def test_clusters_of_a_column_that_rows_lack_are_refused(gmm: Recipe, tmp_path: Path) -> None:
    store = make(gmm, tmp_path, 0, 32, 16)
    with pytest.raises(ValueError, match="the rows have no column 'prompt' to make clusters of"):
        measure.measure(gmm, METRICS, 0, 32, store, cluster="prompt")


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("label", "group_by=label needs labels"),
        ("nope", "unknown column to group rows by: 'nope', .* Columns of this study's rows: .*label"),
        ("prompt", "unknown column to group rows by: 'prompt'"),
        ("lable", "did you mean 'label'"),
        (64, None),
        (2, None),
    ],
)
def test_a_study_refuses_clusters_that_it_cannot_have(
    make_study: Callable[..., Any], cluster: str | int, message: str | None
) -> None:
    study = make_study(group_by=cluster)
    if message is None:
        study.trial(0, Proposal({}))
        return
    with pytest.raises(ValueError, match=message):
        study.trial(0, Proposal({}))


@pytest.mark.parametrize("strategy", ["single", {"name": "best_of_n", "n": 2}])
def test_rows_have_the_columns_that_are_known_when_planning(strategy: Any) -> None:
    made = Recipe("digits", "ddim", {"name": "uniform", "num_steps": 2}, "none", strategy, "ink").completed()  # type: ignore[arg-type]
    found = run.generate(made, 0, 2)
    assert {*run.COLUMNS, *made.parts.strategy.columns, "x0"} == {*found}


def test_one_sample_makes_no_clusters(make_study: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="group_by=4 makes one cluster of all 1 samples"):
        make_study(group_by=4, num_samples=1).trial(0, Proposal({}))


def test_reference_data_is_scored_once_for_all_metrics_and_models_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, scored = Store(tmp_path), []
    original = run.score
    monkeypatch.setattr(run, "score", lambda *given: scored.append(given[0]["name"]) or original(*given))
    recipes = [
        Recipe(model, "euler", "uniform", "none", "single").completed()  # type: ignore[arg-type]
        for model in ("digits", "digits_flow")
    ]
    for recipe in recipes:
        for name in ("frechet", "kid", "prdc", "memorisation"):
            assert measure.reference(recipe, metric_registry.complete(name), store) is not None
    assert scored == ["classifier"]


def test_a_metric_reads_columns_that_a_strategy_wrote(gmm: Recipe, tmp_path: Path) -> None:
    watched = gmm.override({"strategy": {"name": "variance_filter", "n": 1}})
    metric = metric_registry.complete({"name": "hallucination", "threshold": 0.0})
    store = make(watched, tmp_path, 0, 32, 16, [metric])
    values, errors = measure.measure(watched, [metric], 0, 32, store)
    h = np.concatenate([rows.to_numpy(t["trajectory_variance"]) for t in store.read("rows", watched.key, 0, 32)])
    assert values == {"quality/trajectory_variance": pytest.approx(h.mean()), "quality/hallucination": 1.0}
    assert errors["quality/trajectory_variance"] == pytest.approx(h.std(ddof=1) / math.sqrt(32))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("hallucination", "Use strategy=variance_filter, with strategy.n=1"),
        ({"name": "conditional_diversity", "features": "identity"}, "groups by label, but this study has none"),
    ],
)
def test_a_metric_that_the_recipe_cannot_serve_is_refused_before_any_work(
    make_study: Callable[..., Any], metric: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_study(metrics=[metric]).trial(0, Proposal({}))
