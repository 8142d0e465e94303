"""From a trial to the work that is missing: ranges cut at fixed boundaries, minus what the store already has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from orchestrator.store import Record, Store
from tasks.recipe import Recipe
from tasks.registry import Spec


@dataclass(frozen=True)
class Shard:
    """One unit of work, as plain data: make rows [start, stop) of a recipe and score them.

    Attributes:
        recipe: the recipe's fields.
        start, stop: range of sample indices.
        rows: whether the rows themselves are missing.
        scorers: specs of the scorer columns that are missing.
        root: where the store lies.
        key: the recipe's key as the plan knew it; a worker that finds another one refuses.
        isolated: whether the rows are made without their neighbours, to find the one that kills its worker.
        calibrates: whether this is no range of rows but the artifacts that the recipe needs first.
        reuse_bytes: bound of the cache of states that trials share; 0 keeps none.
    """

    recipe: dict[str, Any]
    start: int
    stop: int
    rows: bool
    scorers: tuple[Spec, ...]
    root: str
    key: str
    isolated: bool = False
    calibrates: bool = False
    reuse_bytes: int = 0

    def halves(self) -> tuple[Shard, Shard]:
        """The two halves of a range of two rows or more, isolated."""
        middle = (self.start + self.stop) // 2
        return (
            replace(self, stop=middle, isolated=True),
            replace(self, start=middle, isolated=True),
        )

    @property
    def name(self) -> str:
        """``KEY/START-STOP``, as ``solvus shard`` takes it."""
        if self.calibrates:
            return f"{self.key}/calibration"
        return f"{self.key}/{self.start}-{self.stop}"


def covered(records: list[Record], quarantined: Iterable[int] = ()) -> list[tuple[int, int]]:
    """The union of committed ranges and quarantined rows, as disjoint ranges in order."""
    merged: list[tuple[int, int]] = []
    spans = [(record.start, record.stop) for record in records] + [(index, index + 1) for index in quarantined]
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def missing(start: int, stop: int, have: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What [start, stop) still lacks."""
    gaps, position = [], start
    for low, high in have:
        if high <= position:
            continue
        if low >= stop:
            break
        if low > position:
            gaps.append((position, low))
        position = max(position, high)
    if position < stop:
        gaps.append((position, stop))
    return gaps


def cut(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at the multiples of ``size``."""
    while start < stop:
        end = min(stop, start - start % size + size)
        yield start, end
        start = end


@dataclass(frozen=True)
class Work:
    """What a trial still lacks: pieces with equal needs, cut into shards only as they are asked for."""

    pieces: tuple[Shard, ...]
    size: int

    @cached_property
    def _count(self) -> int:
        return sum((piece.stop - 1) // self.size - piece.start // self.size + 1 for piece in self.pieces)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Shard]:
        for piece in self.pieces:
            for start, stop in cut(piece.start, piece.stop, self.size):
                yield replace(piece, start=start, stop=stop)

    @property
    def samples(self) -> int:
        """Samples that must be made; shards that only score make none."""
        return sum(piece.stop - piece.start for piece in self.pieces if piece.rows)


def shards(
    recipe: Recipe, scorers: list[Spec], start: int, stop: int, size: int, store: Store, reuse_bytes: int = 0
) -> Work:
    """The shards that a trial still needs, in index order.

    Args:
        recipe: the trial's recipe.
        scorers: columns that its metrics read.
        start, stop: the trial's range of sample indices.
        size: shard size; boundaries lie at its multiples, so growing a trial computes only the new rows.
        store: what is there already.
    """
    row_gaps = missing(start, stop, covered(store.committed("rows", recipe.key), store.quarantined(recipe.key)))
    column_gaps = [(spec, _unscored(recipe, spec, start, stop, store)) for spec in scorers]
    edges = {start, stop}
    for gaps in (row_gaps, *(gaps for _, gaps in column_gaps)):
        edges.update(edge for gap in gaps for edge in gap)
    ordered, data = sorted(edges), asdict(recipe)
    pieces = []
    for low, high in zip(ordered, ordered[1:], strict=False):
        need_rows = _inside(low, row_gaps)
        need = tuple(spec for spec, gaps in column_gaps if _inside(low, gaps))
        if need_rows or need:
            pieces.append(Shard(data, low, high, need_rows, need, store.root, recipe.key, reuse_bytes=reuse_bytes))
    return Work(tuple(pieces), size)


def aside(recipe: Recipe, scorers: list[Spec], store: Store) -> dict[int, str]:
    """Rows that do not count, with the reasons: those in quarantine, and those whose companion is."""
    found: dict[int, str] = {}
    for spec in scorers:
        if (other := recipe.companion(spec)) is not None:
            found |= {i: f"its companion in {other.key}: {why}" for i, why in store.quarantined(other.key).items()}
    return dict(sorted((found | store.quarantined(recipe.key)).items()))


def _unscored(recipe: Recipe, scorer: Spec, start: int, stop: int, store: Store) -> list[tuple[int, int]]:
    """Where [start, stop) lacks a scorer's column."""
    records = store.committed("columns", recipe.column_key(scorer))
    return missing(start, stop, covered(records, aside(recipe, [scorer], store)))


def companions(recipe: Recipe, scorers: list[Spec], start: int, stop: int, size: int, store: Store) -> Work:
    """The rows of other recipes that scoring a trial's rows needs first, and the store lacks."""
    pieces: dict[tuple[str, int, int], Shard] = {}
    for spec in scorers:
        if (other := recipe.companion(spec)) is None:
            continue
        for low, high in _unscored(recipe, spec, start, stop, store):
            lacking = shards(other, [], low, high, size, store).pieces
            pieces |= {(piece.key, piece.start, piece.stop): piece for piece in lacking}
    return Work(tuple(pieces.values()), size)


ARTIFACTS = "artifacts"


def uncalibrated(recipe: Recipe, store: Store) -> list[str]:
    """Keys of the artifacts that the recipe needs and the store lacks."""
    ours = [c.key for c in recipe.calibrations if not c.key.startswith("file:")]
    return [key for key in ours if store.get_arrays(ARTIFACTS, key) is None]


def calibration(recipe: Recipe, store: Store) -> Shard:
    """The unit of work that makes them."""
    return Shard(asdict(recipe), 0, 1, False, (), store.root, recipe.key, calibrates=True)


def _inside(index: int, gaps: list[tuple[int, int]]) -> bool:
    return any(low <= index < high for low, high in gaps)
