"""From stored rows to a trial's values and their intervals.

Rows are folded in index order in chunks of fixed size, whatever the shard sizes were, so a value is the same number
whoever made the rows. A second pass adds up every row's influence, which gives standard errors without resampling.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from orchestrator import rows
from orchestrator.plan import aside, covered, missing
from orchestrator.store import Store
from tasks import registry, run
from tasks.intervals import clustered, standard_error
from tasks.recipe import Recipe, canonical, digest, scorer_identity
from tasks.registry import Spec

CHUNK = 4096
LARGEST = 2**24  # numbers of reference data that are scored at once


def completed(metrics: Iterable[Spec | str]) -> list[Spec]:
    """What a study measures that was asked for some metrics: these, then what goes with them, and the cost."""
    groups = [accompanied(metric) for metric in metrics]
    found = [group[0] for group in groups]
    for spec in [*chain.from_iterable(group[1:] for group in groups), registry.metrics.complete("cost")]:
        if not any(spec["name"] == other["name"] for other in found):
            found.append(spec)
    return found


def accompanied(metric: Spec | str) -> list[Spec]:
    """A metric, and those that its value must never be shown without (perplexity: the entropy of the tokens)."""
    spec = registry.metrics.complete(metric)
    return [spec, *map(registry.metrics.complete, getattr(registry.metrics.get(spec["name"]), "beside", ()))]


def compares(plugin: Any) -> bool:
    """Whether a metric compares samples with data."""
    return bool(getattr(plugin, "compares_with_data", False))


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


def chunks(
    recipe: Recipe, needs: list[Spec], start: int, stop: int, store: Store, more: tuple[str, ...] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the rows [start, stop), ``CHUNK`` rows at a time; ``position`` numbers them from 0.

    ``more`` names columns of the rows that not every metric reads; one that the rows lack is NaN.
    """
    names = ["label", "nfe", "reward_calls", "decodes", *(["work"] if recipe.weighs else [])]
    names = list(dict.fromkeys([*names, *more]))  # a metric and the clusters may want the same one
    spans = missing(start, stop, covered([], aside(recipe, needs, store)))
    sources = [_rechunk(store, "rows", recipe.key, names, spans)]
    sources += [_rechunk(store, "columns", recipe.column_key(spec), ["value"], spans) for spec in needs]
    position = 0
    for parts in zip(*sources, strict=True):
        chunk = dict(parts[0])
        for spec, part in zip(needs, parts[1:], strict=True):
            chunk[spec["name"]] = part["value"]
        count = len(chunk["nfe"])
        if "work" in chunk:  # not written where every evaluation was of the whole network
            chunk["work"] = np.where(np.isnan(chunk["work"]), chunk["nfe"], chunk["work"])
        chunk["position"] = np.arange(position, position + count)
        position += count
        yield chunk


def own_columns(metrics: list[Spec]) -> tuple[str, ...]:
    """Columns of the rows themselves that some metrics read beside those that every row has."""
    found = [name for spec in metrics for name in getattr(registry.metrics.build(spec), "columns", ())]
    return tuple(dict.fromkeys(found))


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
    known = {"metric": registry.identity(metric), "model": source, "revision": model.revision, "scorers": identity}
    key = digest(known | _revised([metric], model))
    found = store.get_arrays("references", key)
    if found is None:
        found = plugin.reference(model, lambda spec, samples, labels: _scored(spec, samples, labels, store))
        if found is not None:
            store.put_arrays("references", key, found)
    return found


def _revised(metrics: list[Spec], model: Any) -> dict[str, Any]:
    """What else a value depends on: the data that a model was given, and revisions of metrics other than the first."""
    plugins = [registry.metrics.build(spec) for spec in metrics]
    revisions = [[p.name, revision] for p in plugins if (revision := getattr(p, "revision", "1")) != "1"]
    data = getattr(model, "data_identity", None) if any(map(compares, plugins)) else None
    return ({"revisions": revisions} if revisions else {}) | ({"data": data} if data else {})


def _scored(spec: Spec, samples: Any, labels: Any, store: Store) -> np.ndarray:
    """A scorer's column over reference data, made once for all metrics and models that compare with the same data.

    Its key is the content of the data and the identity of the scorer: weights, and what it does to an image first.
    """
    if (content := getattr(samples, "identity", None)) is None:  # read when asked for, and known without being read
        samples = np.asarray(samples)
        whole = hashlib.sha256(f"{samples.dtype.str}{samples.shape}".encode())
        whole.update(np.ascontiguousarray(samples).data)
        content = whole.hexdigest()
    data = {"samples": content}
    if registry.scorer(spec).needs_labels:
        data["labels"] = hashlib.sha256(np.asarray(labels, dtype=np.int64).tobytes()).hexdigest()
    key = digest({"data": data, "scorer": scorer_identity(spec)})
    found = store.get_arrays("references", key)
    if found is None:
        known = np.zeros(len(samples), dtype=np.int64) if labels is None else np.asarray(labels)
        size = max(1, min(256, LARGEST // math.prod(samples.shape[1:])))
        found = {"value": run.score(spec, samples, known, 0, size, "cpu")}
        store.put_arrays("references", key, found)
    return found["value"]


Cluster = str | int  # a column of the rows, or a number k: rows whose indices agree modulo k


def clusters(chunk: dict[str, np.ndarray], cluster: Cluster) -> np.ndarray:
    """The cluster of every row of a chunk.

    Raises:
        ValueError: the rows lack the column.
    """
    if isinstance(cluster, int):
        return chunk["sample_id"] % cluster
    found = chunk[cluster]
    if found.dtype.kind == "f" and np.isnan(found).any():
        raise ValueError(f"the rows have no column {cluster!r} to make clusters of. Set group_by to label or null.")
    return found


def _columns_of(cluster: Cluster | None) -> tuple[str, ...]:
    return () if cluster is None else ("sample_id" if isinstance(cluster, int) else cluster,)


def measure(
    recipe: Recipe, metrics: list[Spec], start: int, stop: int, store: Store, cluster: Cluster | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Values of a trial whose rows and columns are complete, and their standard errors.

    Rows are taken as independent, or as coming in clusters, whose standard errors hold for new clusters.

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
            "metrics": [registry.identity(spec) for spec in metrics],
            "range": [start, stop],
            "without": without,
        }
        | ({} if cluster is None else {"cluster": cluster})
        | _revised(metrics, recipe.parts.model)
    )
    known = store.get_json("values", key)
    if known is not None:
        return known["values"], known["errors"]
    plugins = [registry.metrics.build(spec) for spec in metrics]
    references = [reference(recipe, spec, store) for spec in metrics]
    summaries: list[Any] = [None] * len(plugins)
    total, more = 0, own_columns(metrics) + _columns_of(cluster)
    for chunk in chunks(recipe, needs, start, stop, store, more):
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
    effects: dict[str, list[np.ndarray]] = {name: [] for name in values}
    groups: list[np.ndarray] = []
    for chunk in chunks(recipe, needs, start, stop, store, more):
        if cluster is not None:
            chunk["group"] = clusters(chunk, cluster)
            groups.append(chunk["group"])
        for plugin, summary, ref in zip(plugins, summaries, references, strict=True):
            for name, effect in plugin.influence(summary, ref, chunk).items():
                effects[name].append(effect)
    group = np.concatenate(groups) if groups else None
    errors = {name: standard_error(np.concatenate(parts), group) for name, parts in effects.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} for {recipe.key}; it never counts as a result.")
    store.put_json("values", key, {"values": values, "errors": errors})
    return values, errors


class Influences(NamedTuple):
    """A value and what every row of a range has to do with it.

    Attributes:
        value: of the rows that are there.
        rows: first-order effect of each row on it, (stop - start,); NaN for rows in quarantine.
        groups: the cluster of each row, (stop - start,); None where rows are independent.
    """

    value: float
    rows: np.ndarray
    groups: np.ndarray | None = None

    @property
    def independent(self) -> np.ndarray:
        """One effect for each thing that is independent of the others: a row, or a cluster."""
        if self.groups is None:
            return self.rows
        used = np.isfinite(self.rows)
        return clustered(self.rows[used], self.groups[used])


def influences(
    recipe: Recipe, metric: Spec, name: str, start: int, stop: int, store: Store, cluster: Cluster | None = None
) -> Influences:
    """A value and every row's first-order effect on it: what paired comparisons subtract."""
    plugin, needs, ref = registry.metrics.build(metric), scorers([metric]), reference(recipe, metric, store)
    summary, more = None, own_columns([metric]) + _columns_of(cluster)
    for chunk in chunks(recipe, needs, start, stop, store, more):
        part = plugin.summarize(chunk)
        summary = part if summary is None else plugin.merge(summary, part)
    found, groups = [], []
    for chunk in chunks(recipe, needs, start, stop, store, more):
        if cluster is not None:
            chunk["group"] = clusters(chunk, cluster)
            groups.append(chunk["group"])
        found.append(plugin.influence(summary, ref, chunk)[name])
    there = np.ones(stop - start, dtype=bool)
    there[[index - start for index in aside(recipe, needs, store) if start <= index < stop]] = False
    effects = np.full(stop - start, np.nan)
    effects[there] = np.concatenate(found)
    if not groups:
        return Influences(plugin.compute(summary, ref)[name], effects)
    known = np.concatenate(groups)
    group = np.zeros(stop - start, dtype=known.dtype)
    group[there] = known
    return Influences(plugin.compute(summary, ref)[name], effects, group)


def paired_difference(a: Influences, b: Influences) -> tuple[float, float]:
    """Value of a minus value of b and its standard error, when both were measured on the same sample indices."""
    return a.value - b.value, standard_error(a.rows - b.rows, a.groups)
