"""From stored rows to a trial's values and their intervals.

Rows are folded in index order in chunks of fixed size, whatever the shard sizes were, so a value is the same number
whoever made the rows. A second pass adds up every row's influence, which gives standard errors without resampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np

from orchestrator import rows
from orchestrator.plan import aside, covered, missing
from orchestrator.store import Store
from tasks import registry, run
from tasks.recipe import Recipe, canonical, digest, scorer_identity
from tasks.registry import Spec

CHUNK = 4096
Z95 = 1.959963984540054


def scorers(metrics: list[Spec]) -> list[Spec]:
    """The scorer columns that some metrics read, each once.

    Raises:
        ValueError: two settings of one scorer, whose values would have the same name.
    """
    found: dict[str, Spec] = {}
    for spec in metrics:
        for need in registry.metrics.build(spec).needs():
            if found.setdefault(need["name"], need) != need:
                raise ValueError(
                    f"two metrics read scorer {need['name']} with different settings, {canonical(found[need['name']])} "
                    f"and {canonical(need)}, but their values would have one name. Measure one of them in another "
                    "study."
                )
    return list(found.values())


def chunks(recipe: Recipe, needs: list[Spec], start: int, stop: int, store: Store) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the rows [start, stop), ``CHUNK`` rows at a time; ``position`` numbers them from 0."""
    names = ["label", "nfe", "reward_calls", "decodes", *(["work"] if recipe.masks else [])]
    spans = missing(start, stop, covered([], aside(recipe, needs, store)))
    sources = [_rechunk(store, "rows", recipe.key, names, spans)]
    sources += [_rechunk(store, "columns", recipe.column_key(spec), ["value"], spans) for spec in needs]
    position = 0
    for parts in zip(*sources, strict=True):
        chunk = dict(parts[0])
        for spec, part in zip(needs, parts[1:], strict=True):
            chunk[spec["name"]] = part["value"]
        count = len(chunk["nfe"])
        chunk["position"] = np.arange(position, position + count)
        position += count
        yield chunk


def _rechunk(
    store: Store, kind: str, key: str, columns: list[str], spans: list[tuple[int, int]]
) -> Iterator[dict[str, np.ndarray]]:
    held: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    size = 0
    for table in chain.from_iterable(store.read(kind, key, *span, columns) for span in spans):
        for name in columns:
            unknown = name not in table.column_names  # made before decoder calls were counted
            held[name].append(np.full(table.num_rows, np.nan) if unknown else rows.to_numpy(table[name]))
        size += table.num_rows
        while size >= CHUNK:
            whole = {name: np.concatenate(parts) for name, parts in held.items()}
            yield {name: value[:CHUNK] for name, value in whole.items()}
            held = {name: [value[CHUNK:]] for name, value in whole.items()}
            size -= CHUNK
    if size:
        yield {name: np.concatenate(parts) for name, parts in held.items()}


def reference(recipe: Recipe, metric: Spec, store: Store) -> dict[str, np.ndarray] | None:
    """What a metric compares with, made once for a model and kept in the store."""
    plugin, model = registry.metrics.build(metric), recipe.parts.model
    identity = [scorer_identity(spec) for spec in plugin.needs()]
    source = registry.model_identity(recipe.model)
    key = digest({"metric": metric, "model": source, "revision": model.revision, "scorers": identity})
    found = store.get_arrays("references", key)
    if found is None:

        def score(spec: Spec, samples: Any, labels: Any) -> np.ndarray:
            return run.score(spec, np.asarray(samples), np.asarray(labels), 0, 256, "cpu")

        found = plugin.reference(model, score)
        if found is not None:
            store.put_arrays("references", key, found)
    return found


def measure(
    recipe: Recipe, metrics: list[Spec], start: int, stop: int, store: Store
) -> tuple[dict[str, float], dict[str, float]]:
    """Values of a trial whose rows and columns are complete, and their standard errors.

    Raises:
        ValueError: a value that is not finite, or fewer rows than the trial asked for.
        CorruptShard: a damaged file; its range must be made again.
    """
    needs = scorers(metrics)
    without = [index for index in aside(recipe, needs, store) if start <= index < stop]
    key = digest(
        {
            "rows": recipe.key,
            "columns": [recipe.column_key(spec) for spec in needs],
            "metrics": metrics,
            "range": [start, stop],
            "without": without,
        }
    )
    known = store.get_json("values", key)
    if known is not None:
        return known["values"], known["errors"]
    plugins = [registry.metrics.build(spec) for spec in metrics]
    references = [reference(recipe, spec, store) for spec in metrics]
    summaries: list[Any] = [None] * len(plugins)
    total = 0
    for chunk in chunks(recipe, needs, start, stop, store):
        total += len(chunk["nfe"])
        for i, plugin in enumerate(plugins):
            part = plugin.summarize(chunk)
            summaries[i] = part if summaries[i] is None else plugin.merge(summaries[i], part)
    if total != stop - start - len(without):
        raise ValueError(
            f"{total} rows of {stop - start - len(without)} are there for {recipe.key}; refusing to report on fewer."
        )
    values: dict[str, float] = {}
    for plugin, summary, ref in zip(plugins, summaries, references, strict=True):
        values |= plugin.compute(summary, ref)
    squares: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in values}
    for chunk in chunks(recipe, needs, start, stop, store):
        for plugin, summary, ref in zip(plugins, summaries, references, strict=True):
            for name, effect in plugin.influence(summary, ref, chunk).items():
                used = effect[np.isfinite(effect)]
                squares[name][0] += len(used)
                squares[name][1] += float(used.sum())
                squares[name][2] += float((used**2).sum())
    errors = {}
    for name, (count, first, second) in squares.items():
        variance = max(second / count - (first / count) ** 2, 0.0) if count > 1 else math.nan
        errors[name] = math.sqrt(variance / max(count - 1, 1))
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} for {recipe.key}; it never counts as a result.")
    store.put_json("values", key, {"values": values, "errors": errors})
    return values, errors


def influences(
    recipe: Recipe, metric: Spec, name: str, start: int, stop: int, store: Store
) -> tuple[float, np.ndarray]:
    """A value and every row's first-order effect on it, (stop - start,): what paired comparisons subtract."""
    plugin, needs, ref = registry.metrics.build(metric), scorers([metric]), reference(recipe, metric, store)
    summary = None
    for chunk in chunks(recipe, needs, start, stop, store):
        part = plugin.summarize(chunk)
        summary = part if summary is None else plugin.merge(summary, part)
    effects = [plugin.influence(summary, ref, c)[name] for c in chunks(recipe, needs, start, stop, store)]
    return plugin.compute(summary, ref)[name], np.concatenate(effects)


def paired_difference(a: tuple[float, np.ndarray], b: tuple[float, np.ndarray]) -> tuple[float, float]:
    """Value of a minus value of b and its standard error, when both were measured on the same sample indices."""
    effect = a[1] - b[1]
    effect = effect[np.isfinite(effect)]
    return a[0] - b[0], float(effect.std(ddof=1) / math.sqrt(len(effect)))
