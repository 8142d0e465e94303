"""``solvus shard``."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.exits import COMPLETE, FAILED
from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def call(args: Any) -> int:
    """``solvus shard``."""
    import numpy as np

    from orchestrator import rows
    from orchestrator.store import Store
    from tasks.recipe import Recipe
    from tasks.run import generate
    from tasks.types import sample_shape

    names = [item for item in args.overrides if "=" not in item]
    args.overrides = [item for item in args.overrides if "=" in item]
    root, _ = root_and_name(args)
    store = Store(root, create=False)
    try:
        (name,) = names
        key, span = name.split("/")
        start, stop = (int(part) for part in span.split("-"))
    except ValueError:
        raise ValueError(f"a shard is named KEY/START-STOP, got {' '.join(names) or 'nothing'!r}.") from None
    spec = store.get_json("recipes", key) if key.isalnum() else None
    if spec is None:
        raise ValueError(f"no recipe {key!r} in {root}. Error messages and the trial table name them.")
    recipe = Recipe(**spec)
    recipe.check()
    began = time.perf_counter()
    columns = generate(recipe, start, stop)
    seconds = time.perf_counter() - began
    equal: bool | None
    try:
        shape = sample_shape(recipe.parts.model)
        stored = np.concatenate([rows.samples(t, shape) for t in store.read("rows", key, start, stop)])
        equal = bool(np.array_equal(stored, rows.as_stored(columns["x0"], recipe.parts.model.kind)))
    except KeyError:
        equal = None
    data = {"key": key, "start": start, "stop": stop, "seconds": seconds, "equal_to_stored": equal, "recipe": spec}
    told = {True: "equal, bit for bit", False: "DIFFERENT", None: "not in the store"}[equal]
    emit(args, data, f"{stop - start} rows in {seconds:.2f} s; compared with the stored ones: {told}")
    return FAILED if equal is False else COMPLETE


VERB = Verb(
    "make one shard again, here, and compare it with the stored one",
    call,
    takes_settings=True,
    usage="solvus shard [-h] [--json] KEY/START-STOP [KEY=VALUE ...]",
)
