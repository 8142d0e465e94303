"""Weights that the user has: where they lie, what to fetch where they are missing, and the hash that enters keys."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tasks.checkpoint import check_weights, file_digest, read_json
from tasks.hub_errors import explained
from tasks.vocabulary import lacking

SETTINGS = (".json", ".txt", ".model")  # files that change what a network does, beside its weights


def home() -> Path:
    """The folder of weights: $SOLVUS_WEIGHTS, or ``~/.cache/solvus/weights``."""
    return Path(os.environ.get("SOLVUS_WEIGHTS") or "~/.cache/solvus/weights").expanduser()


@dataclass(frozen=True)
class Source:
    """What one plug-in needs.

    Attributes:
        plugin: kind and name of the plug-in, for messages.
        folder: its folder below :func:`home`.
        fetch: what a person fetches, and from where.
        model_type: what config.json must call the model.
        files: names of the weight files in the folder.
        tokenizer: class in transformers of the tokenizer beside them; empty where no text is read.
    """

    plugin: str
    folder: str
    fetch: str
    model_type: str
    files: tuple[str, ...] = ("model.safetensors",)
    tokenizer: str = ""

    def find(self, path: str, pinned: str) -> Path:
        """The folder with the weights: the path given, a hub id at a pinned commit, or the plug-in's own below home.

        Raises:
            ValueError: nothing there, a file missing or damaged, another model, a hub id without a commit, or a hub
                that does not answer.
        """
        field = self.plugin.split()[0]
        place = Path(path).expanduser() if path else home() / self.folder
        if path and not place.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            if not re.fullmatch(r"[0-9a-f]{40}", pinned):
                raise ValueError(
                    f"{field}.path {path!r} is no folder. If it is a hub id, set {field}.pinned to the commit to use "
                    f"(40 hexadecimal digits), got {pinned!r}: without one the weights could change between runs."
                )
            place = _download(path, pinned, self.plugin, self.files)
        missing = [name for name in ("config.json", *self.files) if not (place / name).is_file()]
        if missing:
            raise ValueError(
                f"{self.plugin} has no weights: {place} lacks {', '.join(missing)}. Fetch {self.fetch}, put them "
                f"there, or set {field}.path to their folder."
            )
        given = read_json(place / "config.json", f"the settings of {self.plugin}").get("model_type", self.model_type)
        if given != self.model_type:
            raise ValueError(
                f"{self.plugin} needs a model of type {self.model_type!r}, but {place}/config.json describes one of "
                f"type {given!r}. Fetch {self.fetch}, or set {field}.path to their folder."
            )
        for name in self.files:
            check_weights(place / name, f"Fetch {self.fetch}, again.")
        if self.tokenizer and (absent := lacking(place, self.tokenizer)):
            raise ValueError(
                f"{self.plugin} cannot read prompts: {place} has no whole {self.tokenizer}, it lacks {absent}. Fetch "
                f"{self.fetch}, and put the tokenizer's files there too."
            )
        return place

    def revision(self, path: str, pinned: str) -> str:
        """Hash of the weights and of the settings beside them; the same wherever they lie."""
        place = self.find(path, pinned)
        names = {*self.files, *(f.name for f in place.iterdir() if f.suffix in SETTINGS)}
        parts = [f"{name}:{file_digest(place / name)}" for name in sorted(names)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@lru_cache(maxsize=8)
def _download(repository: str, commit: str, plugin: str, files: tuple[str, ...]) -> Path:
    """The snapshot of a commit with the weights that are read; the same ones in other formats stay where they are."""
    import huggingface_hub

    wanted = [*files, *(f"*{suffix}" for suffix in SETTINGS)]
    with explained(f"{plugin}: {repository}@{commit}", repository, commit):
        return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=wanted))


def read_state(path: Path, inner: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file; nothing else in it is run.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
        found = found[inner] if inner in found else found
        assert all(isinstance(value, torch.Tensor) for value in found.values())
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as weights: {type(error).__name__}: {error}. Fetch it again."
        ) from None
    return dict(found)


def fill(network: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state whose names must all fit; counters and position buffers may be missing on either side.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    idle = ("num_batches_tracked", "position_ids")
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its network: {str(error).splitlines()[-1].strip()}") from None
    odd = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith(idle)]
    if odd:
        raise ValueError(
            f"{path} does not fit its network: {len(odd)} tensors are missing or left over, such as {odd[0]}."
        )


def from_folder(cls: Any, place: Path, device: str) -> Any:
    """A transformers model from a folder in evaluation mode, float32, with no weight left as it was drawn.

    Raises:
        ValueError: weights that are missing: transformers alone would only warn, and the numbers would look right.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        network, info = cls.from_pretrained(
            place, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{place} cannot be loaded as a {cls.__name__}: {str(error).splitlines()[0]}. Fetch it again."
        ) from None
    if info["missing_keys"]:
        raise ValueError(
            f"{place} is no whole {cls.__name__}: {sorted(info['missing_keys'])[0]} and "
            f"{len(info['missing_keys']) - 1} more tensors are missing. Fetch it again."
        )
    return network.eval().requires_grad_(False).to(device)
