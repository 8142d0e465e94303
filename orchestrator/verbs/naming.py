"""Which root and which studies a verb that only reads was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def root_and_name(args: Any) -> tuple[str, str | None]:
    """The root and, if one was named, the study of a verb that only reads."""
    from orchestrator import config

    files = config.studies(args.config_dir)
    stored = [
        f"name={name}" if key == "study" and name not in files and _is_stored(args, name) else item
        for item in args.overrides for key, _, name in [item.partition("=")]
    ]  # fmt: skip
    data = config.compose(stored, args.config_dir)
    named = any(item.split("=")[0] in ("study", "name") for item in args.overrides)
    return config.root_of(data), str(data["name"]) if named else None


def _is_stored(args: Any, name: str) -> bool:
    """Whether a study of that name was run: its file need not be named again to read its results."""
    from orchestrator import config, results

    root = [item for item in args.overrides if item.startswith("root=")]
    return name in results.known(config.root_of(config.compose(root)))


def studies(args: Any, count: int, usage: str) -> list[tuple[str, str]]:
    """(root, name) of the studies that were given: a name below the root, or a study's folder.

    Raises:
        ValueError: another number of them.
    """
    given = [item for item in args.overrides if "=" not in item]
    args.overrides = [item for item in args.overrides if "=" in item]
    root, name = root_and_name(args)
    if not given and count == 1 and name is not None:
        given = [name]
    if len(given) != count:
        raise ValueError(f"expected {count} studies, got {len(given)}. Use: {usage}")
    found = []
    for item in given:
        place = Path(item)
        is_folder = "/" in item.rstrip("/") and place.absolute().parent.name == "studies"
        found.append((str(place.absolute().parents[1]), place.absolute().name) if is_folder else (root, item))
    return found
