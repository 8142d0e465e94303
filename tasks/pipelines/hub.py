"""Where a pipeline's files lie: a folder, or a revision of the Hugging Face hub that is pinned by its commit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.checkpoint import read_json
from tasks.hub_errors import explained
from tasks.pipelines.family import family_of

HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
INDEX = "model_index.json"
SETTINGS = ("*.json", "*.txt", "*.model")  # no pickles, no code
PIPELINE = "a folder made by save_pretrained"
ADAPTER = "a .safetensors file, a folder with one"


def locate(path: str, what: str = "model.path", variant: str | None = None) -> Path:
    """The folder of ``FOLDER`` or of ``OWNER/NAME@COMMIT``; the latter is fetched once, and then read from disk.

    Of a hub model only what its pipeline is made of is fetched, in one variant: many hold the same weights twice.

    Args:
        path: as the user gave it.
        what: where, for messages.
        variant: which weights where there are several, such as fp16; None takes those without a mark.

    Raises:
        ValueError: neither; a hub name without its commit; no pipeline of a known family; or the hub refuses it or
            cannot be reached.
    """
    found = _parsed(path, what, PIPELINE)
    return found if isinstance(found, Path) else Path(_fetch(*found, variant, what))


def locate_adapter(path: str, what: str, weight: str | None) -> Path:
    """The same for an adapter, of which one file is fetched.

    Args:
        path: as the user gave it, no file.
        what: where, for messages.
        weight: the file's name; None takes the only one.

    Raises:
        ValueError: as of a pipeline, or several files of which none was named.
    """
    found = _parsed(path, what, ADAPTER)
    return found if isinstance(found, Path) else Path(_fetch_adapter(*found, weight, what))


def _parsed(path: str, what: str, allowed: str) -> Path | tuple[str, str]:
    """The folder, or name and commit of a hub model."""
    if not path.strip():
        raise ValueError(f"{what} is empty. Give {allowed}, or OWNER/NAME@COMMIT of the Hugging Face hub.")
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    if path.endswith((".pkl", ".pickle", ".pt", ".ckpt", ".bin")):
        raise ValueError(
            f"{what} {path!r} is a pickle, which runs code when it is read; none is loaded. Have its maker's tools "
            "write safetensors (save_pretrained), and give these. For a network pickle of EDM, use model=edm."
        )
    found = HUB.fullmatch(path)
    if found is None or path.startswith((".", "/", "~")) or path.endswith(".safetensors"):
        raise ValueError(
            f"{what} {path!r} is not there. Give {allowed}, or OWNER/NAME@COMMIT with the 40 hexadecimal digits of a "
            "commit on the Hugging Face hub."
        )
    name, revision = found["name"], found["revision"] or ""
    if not COMMIT.fullmatch(revision):
        raise ValueError(
            f"{what} {path!r} is not pinned, so its weights may change under the study. Write {name}@COMMIT with the "
            f"commit's 40 hexadecimal digits (https://huggingface.co/{name}/commits/main)."
        )
    return name, revision


def weights_of(component: str, variant: str | None) -> list[str]:
    """Patterns of the files with a component's weights in one variant, whole or in shards."""
    mark = f".{variant}" if variant else ""
    names = (f"*model{mark}", f"*model{mark}-?????-of-?????", f"*model-?????-of-?????{mark}")
    return [f"{component}/{name}.safetensors" for name in dict.fromkeys(names)]


def wanted(index: Mapping[str, Any], variant: str | None, where: str) -> list[str]:
    """Patterns of the files that a pipeline is made of, by its index.

    Raises:
        ValueError: a pipeline of a family that is not known.
    """
    components = family_of(str(index.get("_class_name")), where).saved(index)
    found = [INDEX, "scheduler/*.json"]
    for name in components:
        found += [f"{name}/{pattern}" for pattern in SETTINGS]
        found += weights_of(name, variant) if "tokenizer" not in name else []
    return found


@lru_cache(maxsize=32)
def _fetch(name: str, revision: str, variant: str | None, what: str) -> str:
    from huggingface_hub import list_repo_files

    where = f"{what} {name}@{revision}"
    with explained(where, name, revision):
        root = _snapshot(name, revision, [INDEX], lambda root: (root / INDEX).is_file())
        if not (root / INDEX).is_file():
            raise ValueError(f"{where} has no {INDEX}, so it is not a diffusers pipeline. Give one that has.")
        index = read_json(root / INDEX, "a diffusers pipeline")
        family = family_of(str(index.get("_class_name")), where)
        networks = [component for component in family.saved(index) if "tokenizer" not in component]

        def lacking(files: list[str]) -> list[str]:
            patterns = {part: weights_of(part, variant) for part in networks}
            return [part for part in networks if not any(fnmatchcase(f, p) for f in files for p in patterns[part])]

        root = _snapshot(name, revision, wanted(index, variant, where), lambda root: not lacking(_files(root)))
        if missing := lacking(_files(root)):
            there = [f for f in list_repo_files(name, revision=revision) if f.startswith(f"{missing[0]}/")]
            raise ValueError(
                f"{where} has no .safetensors weights of {missing[0]}{f' in variant {variant!r}' if variant else ''}; "
                f"it has {', '.join(there) or 'nothing of it'}. Set model.variant to one that is there for every "
                "component; pickled weights are not loaded."
            )
    return str(root)


@lru_cache(maxsize=32)
def _fetch_adapter(name: str, revision: str, weight: str | None, what: str) -> str:
    with explained(f"{what} {name}@{revision}", name, revision):
        if weight is None:  # the names first: some hold dozens of adapters, or a pipeline beside one
            files = [file for file in _names(name, revision) if fnmatchcase(file, "*.safetensors") and "/" not in file]
            if len(files) != 1:
                raise ValueError(
                    f"{what} {name}@{revision} holds {', '.join(files) or 'no .safetensors file'}. Set weight beside "
                    "it to the name of the one to load."
                )
            (weight,) = files
        return str(_snapshot(name, revision, [weight], lambda root: (root / weight).is_file()))


def _names(name: str, revision: str) -> list[str]:
    """Files of a hub model with safetensors: the cache's where it has all of these, otherwise the hub's."""
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        kept = snapshot_download(name, revision=revision, allow_patterns=["*.safetensors"], local_files_only=True)
        if found := [path.name for path in Path(kept).glob("*.safetensors")]:
            return found
    except LocalEntryNotFoundError:
        pass
    return list_repo_files(name, revision=revision)


def _files(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.glob("*/*")]


def _snapshot(name: str, revision: str, patterns: list[str], is_whole: Callable[[Path], bool]) -> Path:
    """The folder with the files of some patterns: the cache's where they are there, otherwise they are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        kept = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if is_whole(kept):  # a download that was broken off leaves a folder too
            return kept
    except LocalEntryNotFoundError:
        pass
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
