"""Whether the weights of a saved pipeline are whole, told by their headers: no tensor is read.

transformers draws what is missing at random and goes on; diffusers leaves it without numbers.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.checkpoint import check_weights
from tasks.pipelines.folder import PipelineFolder

LIBRARIES = ("diffusers", "transformers")
IDLE = ("num_batches_tracked", "position_ids")  # counters that are set anew, and need not be saved


def check_whole(folder: PipelineFolder) -> None:
    """Refuse a pipeline of which a component's weights are damaged, or are not those of its network.

    Args:
        folder: a pipeline whose components are there.

    Raises:
        ValueError: names the component, how many tensors are missing, and one of them.
    """
    for name in folder.components:
        if files := folder.weights(name):
            library, cls = folder.index[name]
            config = json.dumps(folder.config(name), sort_keys=True)
            stamp = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
            _check(str(folder.root), name, library, cls, folder.variant, config, stamp)


@lru_cache(maxsize=64)
def _check(
    root: str, name: str, library: str, cls: str, variant: str | None, config: str, stamp: tuple[Any, ...]
) -> None:
    again = f"Save or download {name}/ again."
    for file, *_ in stamp:
        check_weights(Path(file), again)
    if "quantization_config" in json.loads(config):
        return  # its tensors have other names, which its own package knows
    place, options = Path(root) / name, {"variant": variant} if variant else {}
    try:
        with _silence():
            network = component_class(library, cls)
            _, found = network.from_pretrained(
                root, subfolder=name, device_map="meta", use_safetensors=True, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=library == "transformers", **options,
            )  # fmt: skip
    except Exception as error:  # whatever one of two libraries raises on files that it cannot use
        raise ValueError(f"{place} cannot be loaded as a {cls}: {first_line(error)}. {again}") from None
    missing = sorted(key for key in found["missing_keys"] if not key.endswith(IDLE))
    other = sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"])
    for keys, what in ((missing, "missing"), (other, "of another shape than its config.json says")):
        if keys:
            raise ValueError(f"{place} is no whole {cls}: {what}: {len(keys)} tensors, {keys[0]} first. {again}")


def component_class(library: str, cls: str) -> Any:
    """The class of a component, as the pipeline's index names it.

    Raises:
        ValueError: a library that is not one of the two, or a class that it does not have.
    """
    if library not in LIBRARIES:
        raise ValueError(f"its class is of {library!r}, and only those of {' and '.join(LIBRARIES)} are loaded")
    found = getattr(importlib.import_module(library), cls, None)
    if found is None:
        raise ValueError(f"{library} has no {cls}")
    return found


def first_line(error: Exception) -> str:
    """What an error says at first, without the period; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else repr(error)


@contextmanager
def _silence() -> Iterator[None]:
    """Within, the two libraries print no tables and no progress: what they find is told in one sentence."""
    import diffusers
    import transformers

    sources = [library.utils.logging for library in (diffusers, transformers)]
    levels = [source.get_verbosity() for source in sources]
    for source in sources:
        source.set_verbosity(logging.CRITICAL)
        source.disable_progress_bar()
    try:
        yield
    finally:
        for source, level in zip(sources, levels, strict=True):
            source.set_verbosity(level)
