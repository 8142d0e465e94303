"""From a trial to its missing work: every missing row once, nothing else, at fixed boundaries."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import rows
from orchestrator.plan import covered, cut, missing, shards
from orchestrator.store import Record, Store
from tasks.recipe import Recipe
from tasks.registry import rewards

INK = {"name": "mean_reward", "reward": "ink"}
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 25)), max_size=5)


def indices(ranges: list[tuple[int, int]]) -> set[int]:
    return {i for low, high in ranges for i in range(low, high)}


def records(ranges: list[tuple[int, int]]) -> list[Record]:
    return [Record(low, high, "f", 1, high - low, "s") for low, high in ranges]


def samples(store: Store, recipe: Recipe, start: int, stop: int) -> np.ndarray:
    return np.concatenate([rows.samples(t, (2,)) for t in store.read("rows", recipe.key, start, stop)])


@given(ranges=RANGES, start=st.integers(0, 60), length=st.integers(1, 40))
def test_missing_is_exactly_what_is_not_covered(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    spans = sorted((low, low + size) for low, size in ranges)
    union = covered(records(spans))
    assert indices(union) == indices(spans)
    assert all(a[1] < b[0] for a, b in zip(union, union[1:], strict=False))
    gaps = missing(start, start + length, union)
    assert indices(gaps) == set(range(start, start + length)) - indices(spans)
    assert all(low < high for low, high in gaps) and gaps == sorted(gaps)


@given(start=st.integers(0, 100), length=st.integers(0, 100), size=st.integers(1, 40))
def test_cutting_tiles_the_range_at_the_multiples_of_the_size(start: int, length: int, size: int) -> None:
    pieces = list(cut(start, start + length, size))
    assert [i for low, high in pieces for i in range(low, high)] == list(range(start, start + length))
    assert {edge for piece in pieces for edge in piece} - {start, start + length} == set(
        range(start - start % size + size, start + length, size)
    )


@settings(max_examples=60, deadline=None)
@given(
    have_rows=RANGES,
    have_columns=RANGES,
    start=st.integers(0, 60),
    length=st.integers(1, 40),
    size=st.integers(1, 30),
)
def test_shards_make_every_missing_row_and_column_value_exactly_once(
    gmm: Recipe,
    have_rows: list[tuple[int, int]],
    have_columns: list[tuple[int, int]],
    start: int,
    length: int,
    size: int,
) -> None:
    ink, stop = rewards.complete("ink"), start + length
    spans = {kind: sorted((a, a + n) for a, n in found) for kind, found in
             (("rows", have_rows), ("columns", have_columns))}  # fmt: skip
    committed = lambda kind, key: records(spans[kind])  # noqa: E731
    store: Any = SimpleNamespace(root="root", committed=committed, quarantined=lambda key: {})
    work = shards(gmm, [ink], start, stop, size, store)
    wanted = set(range(start, stop))
    made = [i for shard in work if shard.rows for i in range(shard.start, shard.stop)]
    scored = [i for shard in work if shard.scorers for i in range(shard.start, shard.stop)]
    assert made == sorted(wanted - indices(spans["rows"]))
    assert scored == sorted(wanted - indices(spans["columns"]))
    assert all(shard.rows or shard.scorers for shard in work)
    assert all(shard.start // size == (shard.stop - 1) // size for shard in work)


def test_a_shard_is_named_by_recipe_key_and_range(gmm: Recipe, store: Store) -> None:
    first, second = shards(gmm, [], 8, 24, 16, store)
    assert (first.name, second.name) == (f"{gmm.key}/8-16", f"{gmm.key}/16-24")


def test_growing_a_trial_makes_only_the_new_rows(
    make_study: Callable, launch: Callable, generated: list, gmm: Recipe
) -> None:
    launch(make_study(num_samples=40))
    before = samples(Store(make_study().root), gmm, 0, 40)
    generated.clear()
    grown = launch(make_study(num_samples=72))
    assert [(start, stop) for _, start, stop in generated] == [(40, 48), (48, 64), (64, 72)]
    assert grown.trials[0].state == "complete"
    assert np.array_equal(samples(grown.store, gmm, 0, 40), before)


def test_shrinking_a_trial_makes_nothing(make_study: Callable, launch: Callable, generated: list) -> None:
    launch(make_study(num_samples=40))
    generated.clear()
    assert launch(make_study(num_samples=24)).trials[0].state == "complete"
    assert generated == []


def test_a_new_scorer_on_a_finished_trial_generates_nothing_but_scores(
    make_study: Callable, launch: Callable, generated: list
) -> None:
    launch(make_study(metrics=[]))
    generated.clear()
    scored = launch(make_study(metrics=[INK]))
    assert scored.trials[0].state == "complete" and "reward/ink" in scored.trials[0].values
    assert generated == []
    assert (scored.ledger.spent["rows"], scored.ledger.spent["nfe"]) == (0, 0)
    assert scored.ledger.spent["scored"] == 32


def test_scoring_alone_counts_as_reusing_samples_not_as_making_them(make_study: Callable, launch: Callable) -> None:
    first = launch(make_study(metrics=[]))
    assert (first.watch.samples, first.watch.reused) == (32, 0)
    second = launch(make_study(metrics=[INK]))
    assert (second.watch.samples, second.watch.reused) == (0, 32)


@pytest.mark.parametrize("second", [7, 24, 100])
def test_another_shard_size_in_the_second_half_gives_the_same_samples_and_none_twice(
    make_study: Callable, launch: Callable, generated: list, gmm: Recipe, second: int, tmp_path: Any
) -> None:
    launch(make_study(num_samples=32, shard_size=16))
    half = launch(make_study(num_samples=80, shard_size=second))
    made = [i for _, start, stop in generated for i in range(start, stop)]
    assert made == list(range(80))
    whole = launch(make_study(num_samples=80, shard_size=80, root=str(tmp_path / "undisturbed")))
    assert np.array_equal(samples(half.store, gmm, 0, 80), samples(whole.store, gmm, 0, 80))
    assert half.trials[0].values == whole.trials[0].values
    assert half.trials[0].errors == whole.trials[0].errors
