"""The folder of a saved diffusers pipeline: what it is made of, checked without loading any weights."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.checkpoint import check_fields, check_scheduler, file_digest, noising, prediction, read_json
from tasks.pipelines.family import Family, family_of
from tasks.processes import GaussianProcess
from tasks.vocabulary import lacking

WHAT: str = "a diffusers pipeline"
# Parts of a pipeline that change no image here: the safety checker is never run.
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")


class PipelineFolder:
    """A folder written by a pipeline's ``save_pretrained``.

    Args:
        root: the folder.
        variant: which weights where there are several, such as fp16; None takes those without a mark.
        scheduler: fields that replace those of the folder's scheduler configuration.

    Raises:
        ValueError: the folder is no pipeline, one of a family that is not known, or lacks a component.
    """

    def __init__(self, root: Path, variant: str | None = None, scheduler: dict[str, Any] | None = None) -> None:
        self.root, self.variant = root, variant
        index = root / "model_index.json"
        if not index.is_file() and (root / "config.json").is_file():
            raise ValueError(
                f"{root} has no model_index.json, so it is {WHAT}'s part, not the whole. Give the folder above it, or "
                "model=unet for a single UNet2DModel."
            )
        self.index = read_json(index, WHAT)
        self.family: Family = family_of(str(self.index.get("_class_name")), str(root))
        self.components = self.family.saved(self.index)
        for name in self.components:
            self._check(name)
        saved = read_json(root / "scheduler" / "scheduler_config.json", "a scheduler")
        check_fields(scheduler or {}, saved)
        self.scheduler = saved | (scheduler or {})
        check_scheduler(self.scheduler)

    def _check(self, name: str) -> None:
        folder = self.root / name
        if name not in self.index or not folder.is_dir():
            raise ValueError(
                f"{self.root} lacks the component {name!r} of a {self.index['_class_name']}. Save or download the "
                "whole pipeline again."
            )
        if "tokenizer" in name:
            if missing := lacking(folder, self.index[name][1]):
                raise ValueError(
                    f"{folder} is no whole {self.index[name][1]}: it lacks {missing}, without which prompts are not "
                    f"read. Save or download {name}/ again."
                )
            return
        if not self.weights(name):
            mark = f" of variant {self.variant!r}" if self.variant else ""
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".safetensors", ".pt"))
            raise ValueError(
                f"{folder} has no .safetensors weights{mark}; found {', '.join(others) or 'none'}. Pickled weights are "
                "not loaded: convert them (save_pretrained with safe_serialization), or set model.variant."
            )

    def weights(self, name: str) -> list[Path]:
        """The weight files of a component, of the variant that was asked for."""
        mark = re.compile(r"\.(fp16|bf16|fp32|non_ema|ema)\b")
        found = sorted((self.root / name).glob("*.safetensors"))
        if self.variant:
            return [path for path in found if f".{self.variant}" in path.name]
        return [path for path in found if not mark.search(path.name)]

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a component."""
        return read_json(self.root / name / "config.json", f"the {name} of {WHAT}")

    @cached_property
    def network(self) -> dict[str, Any]:
        """The configuration of the network that denoises."""
        return self.config(self.family.network)

    @property
    def process(self) -> GaussianProcess:
        """The noising process that the scheduler's configuration describes."""
        return noising(self.scheduler)

    @property
    def prediction(self) -> str:
        """What the network predicts, as :func:`tasks.processes.to_x0` names it."""
        return prediction(self.scheduler)

    def digest(self, names: tuple[str, ...]) -> str:
        """SHA-256 over weights, configurations and vocabularies of some components, 16 hexadecimal digits."""
        found = []
        for name in names:
            plain = [p for p in (self.root / name).iterdir() if p.suffix in (".json", ".txt", ".model")]
            plain = [p for p in plain if not p.name.endswith(".index.json")]
            for path in sorted([*self.weights(name), *plain]):
                found.append([name, path.name, content(path)])
        return hashlib.sha256(json.dumps([found, self.scheduler], sort_keys=True).encode()).hexdigest()[:16]


def content(path: Path) -> str:
    """SHA-256 of a file. The hub's cache names large files by it, so these are not read for it."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    return file_digest(real)
