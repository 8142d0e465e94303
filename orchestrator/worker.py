"""What a worker does with a shard: generate, decode, write, score. Runs in this process or in Ray actors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator import rows, telemetry
from orchestrator.ledger import nothing
from orchestrator.origin import origin
from orchestrator.plan import ARTIFACTS, Shard
from orchestrator.states import StateCache
from orchestrator.store import CorruptShard, Store
from orchestrator.texts import EncodedTexts
from tasks import calibration, run
from tasks.recipe import Recipe
from tasks.registry import Spec
from tasks.types import sample_shape


@lru_cache(maxsize=8)
def _store(root: str) -> Store:
    return Store(root)


# Stages of one worker overlap, but only one at a time may use the accelerator (or, on a CPU, the one torch thread).
_DEVICE = threading.Lock()

Made = dict[str, Any]

# Where an executor has strategies' rewards scored somewhere else, it puts here what gives the reward of a spec and of
# the model's prompts.
SERVED: list[Callable[[Spec, tuple[str, ...]], Any]] = []
# The same for the rewards that metrics read, where that is configured.
SERVED_METRICS: list[Callable[[Spec, tuple[str, ...]], Any]] = []


def _recipe(shard: Shard) -> Recipe:
    """The shard's recipe.

    Raises:
        ValueError: the model is not the one that was planned with.
    """
    recipe = Recipe(**shard.recipe)
    if recipe.key != shard.key:
        raise ValueError(
            f"the recipe of shard {shard.name} is {recipe.key} here: the model's weights changed since the study was "
            "planned, or this worker has other ones. Run the study again."
        )
    return recipe


def _trace(shard: Shard) -> None:
    """With $SOLVUS_TRACE set, note every generation that begins, one line a shard: how wasted work is counted."""
    path = os.environ.get("SOLVUS_TRACE")
    if path:
        with open(path, "a") as file:
            file.write(f"{shard.name} {os.getpid()}\n")


def generate(shard: Shard) -> Made:
    """Stage 1, on the accelerator: the shard's columns, and what they cost. Reads them if they are there already."""
    store, recipe = _store(shard.root), _recipe(shard)
    cost, entered = nothing(), time.perf_counter()
    if shard.rows:
        with _DEVICE:
            began = time.perf_counter()
            _trace(shard)
            found: dict[str, Any] = {"artifacts": artifacts(recipe, store)} if recipe.calibrations else {}
            states = StateCache(shard.root, shard.reuse_bytes) if shard.reuse_bytes else None
            if states is not None:
                found["states"] = states
            if hasattr(recipe.parts.model, "text_identity"):
                found["texts"] = EncodedTexts(store)
            if SERVED:
                found["served"] = SERVED[-1]
            apart = getattr(recipe.parts.model, "decodes_apart", False)
            found |= {"tally": cost, "decoded": not apart}
            columns = run.generate(recipe, shard.start, shard.stop, shard.isolated, **found)
            cost["generate_s"] = time.perf_counter() - began
        cost["rows"] = shard.stop - shard.start
        cost["nfe_reused"] = 0 if states is None else states.reused
        cost["nfe"] = int(columns["nfe"].sum()) - cost["nfe_reused"]
        cost["reward_calls"] = int(columns["reward_calls"].sum())
        cost["decodes"] = int(columns["decodes"].sum())
        telemetry.record("solvus_rows", cost["rows"])
        telemetry.record("solvus_nfe", cost["nfe"])
        telemetry.record("solvus_device_seconds", cost["generate_s"], stage="generate")
    else:
        table = pa.concat_tables(store.read("rows", recipe.key, shard.start, shard.stop))
        columns = {"x0": rows.samples(table, sample_shape(recipe.parts.model)), "label": rows.to_numpy(table["label"])}
    telemetry.record("solvus_stage_seconds", time.perf_counter() - entered, stage="generate")
    return {"columns": columns, "cost": cost}


def artifacts(recipe: Recipe, store: Store) -> dict[str, Any]:
    """The recipe's artifacts from the store; those of files are read where they are used.

    Raises:
        ValueError: one is missing or damaged, though the plan put its calibration first.
    """
    found = {}
    for needed in recipe.calibrations:
        if needed.key.startswith("file:"):
            continue
        arrays = store.get_arrays(ARTIFACTS, needed.key)
        if arrays is None:
            raise ValueError(
                f"artifact {needed.key} of {needed.place} is missing or damaged in {store.root}. Run the study again."
            )
        found[needed.key] = arrays
    return found


def calibrate(shard: Shard) -> dict[str, Any]:
    """Make the artifacts that a recipe needs and the store lacks; each is kept with its origin and its cost."""
    store, recipe = _store(shard.root), _recipe(shard)
    cost = nothing()
    parts = recipe.parts
    for needed in recipe.calibrations:
        is_file = needed.key.startswith("file:")
        arrays = calibration.from_file(recipe, needed) if is_file else store.get_arrays(ARTIFACTS, needed.key)
        if arrays is None:
            with _DEVICE:
                arrays, spent = calibration.make(recipe, needed, parts)
            store.put_json(ARTIFACTS, needed.key, needed.meta | {"cost": spent, "origin": origin()})
            store.put_arrays(ARTIFACTS, needed.key, arrays)  # last: its presence says that all is there
            cost["nfe"] += spent["nfe"]
            cost["generate_s"] += spent["generate_s"]
        parts = calibration.bind(parts, needed.place, calibration.arrays_for(recipe, needed, arrays))
    return cost


def decode(shard: Shard, made: Made) -> Made:
    """Stage 2, where the decoder is: rows whose states are latents become images; others pass."""
    recipe = Recipe(**shard.recipe)
    if not shard.rows or not getattr(recipe.parts.model, "decodes_apart", False):
        return made
    with _DEVICE:
        began = time.perf_counter()
        columns = run.decode(recipe, shard.start, made["columns"])
        cost = made["cost"] | {"generate_s": made["cost"]["generate_s"] + time.perf_counter() - began}
    return {"columns": columns, "cost": cost}


def write(shard: Shard, made: Made) -> Made:
    """Stage 3, on a CPU: encode the rows and commit them."""
    if shard.rows:
        entered = time.perf_counter()
        store, recipe = _store(shard.root), Recipe(**shard.recipe)
        model = recipe.parts.model
        constants = {
            "seed": recipe.seed,
            "recipe": shard.key,  # which the first stage compared with the recipe's own
            "model_revision": model.revision,
            "device": recipe.device,
            "dtype": recipe.dtype,
        }
        table = rows.to_table(made["columns"], model.kind, constants)
        store.put("rows", shard.key, shard.start, shard.stop, table, dict(made["cost"]), origin())
        telemetry.record("solvus_stage_seconds", time.perf_counter() - entered, stage="write")
    return made


def score(shard: Shard, made: Made) -> dict[str, Any]:
    """Stage 4, where the scorers run: the missing columns. Returns the shard's whole cost."""
    if not shard.scorers:
        return dict(made["cost"])
    store, recipe, cost = _store(shard.root), Recipe(**shard.recipe), dict(made["cost"])
    samples, labels = rows.as_stored(made["columns"]["x0"], recipe.parts.model.kind), made["columns"]["label"]
    entered = time.perf_counter()
    for scorer in shard.scorers:
        companion = _companion(shard, recipe, scorer, store)
        with _DEVICE:
            began = time.perf_counter()
            values = run.score(
                scorer, samples, labels, shard.start, recipe.batch_size, recipe.device, companion, recipe.texts,
                SERVED_METRICS[-1] if SERVED_METRICS else None,
            )  # fmt: skip
            seconds = time.perf_counter() - began
        cost["score_s"] += seconds
        cost["scored"] += len(values)
        telemetry.record("solvus_reward_seconds", seconds, scorer=scorer["name"])
        telemetry.record("solvus_scored", len(values), scorer=scorer["name"])
        telemetry.record("solvus_device_seconds", seconds, stage="score")
        ledger = {"score_s": seconds, "rows": len(values)}
        table = rows.column_table(values, shard.start)
        store.put("columns", recipe.column_key(scorer), shard.start, shard.stop, table, ledger, origin())
    telemetry.record("solvus_stage_seconds", time.perf_counter() - entered, stage="score")
    return cost


def _companion(shard: Shard, recipe: Recipe, scorer: Spec, store: Store) -> np.ndarray | None:
    """The samples that a scorer compares the shard's with, from the store; None where it compares with none.

    Raises:
        CorruptShard: they are damaged, or gone since the plan saw them.
    """
    other = recipe.companion(scorer)
    if other is None:
        return None
    try:
        table = pa.concat_tables(store.read("rows", other.key, shard.start, shard.stop))
    except KeyError as error:  # another worker found them damaged and withdrew them
        raise CorruptShard(f"companions of shard {shard.name} are gone and will be made again: {error}") from None
    return rows.samples(table, sample_shape(other.parts.model))


def perform(shard: Shard) -> dict[str, Any]:
    """Make what the shard lacks and commit it: the four stages one after another.

    Returns:
        its cost: rows made, network evaluations, reward calls, seconds of generating and of scoring.
    """
    return score(shard, write(shard, decode(shard, generate(shard))))


# An executor with separate pools runs the stages where each belongs.
STAGES: dict[str, Callable[..., Any]] = {"generate": generate, "decode": decode, "write": write, "score": score}
