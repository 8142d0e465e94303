"""The words that the command line knows: groups of plug-ins, groups of files, plain values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

GROUPS = ("model", "solver", "times", "initial", "guidance", "strategy", "reward", "search", "executor", "tracker")
FILES = ("study", "cluster", "space", "preset")  # groups whose members are YAML files
VALUES = (
    "name", "question", "nfe", "schedule", "prompts", "metrics", "labels", "num_samples", "first_index", "batch_size",
    "shard_size", "seed", "dtype", "device", "root", "storage", "price_per_device_hour",
    "reuse_gib", "group_by",
)  # fmt: skip


def files_of(group: str, dirs: Sequence[str] = ()) -> dict[str, Path]:
    """The YAML files of a configuration group, by name."""
    folders = [Path(__file__).parent.parent / "configs", *map(Path, dirs)]
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}


def is_study_name(name: str) -> bool:
    """Whether it can be the name of a folder, and of nothing else."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) is not None


def check_study_name(name: str) -> None:
    """Refuse what cannot name a study.

    Raises:
        ValueError: other characters than those of a folder's plain name, or too many.
    """
    if not is_study_name(name):
        raise ValueError(f"name becomes a folder: use letters, digits, '.', '_' and '-', at most 100; got {name!r}.")
