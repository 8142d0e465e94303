"""Network pickles as EDM writes them, made without its code: small, and with numbers that are the same everywhere."""

from __future__ import annotations

import collections
import hashlib
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from tasks.edm import convert, network

SONG = {"model_type": "SongUNet", "model_channels": 8, "attn_resolutions": [8]}
NCSNPP = SONG | {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
KINDS: dict[str, dict[str, Any]] = {
    "ddpmpp": SONG | {
        "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard", "dropout": 0.1,
        "channel_mult_noise": 1, "resample_filter": [1, 1], "channel_mult": [2, 2, 2], "num_blocks": 1,
        "augment_dim": 9,
    },
    "ncsnpp": NCSNPP | {
        "encoder_type": "residual", "decoder_type": "standard", "channel_mult": [2, 2, 2], "num_blocks": 2,
    },
    "skips": NCSNPP | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 2, 2], "num_blocks": 1},
    "adm": {
        "model_type": "DhariwalUNet", "model_channels": 32, "channel_mult": [1, 2, 4], "num_blocks": 1,
        "attn_resolutions": [8, 4], "use_fp16": True,
    },
}  # fmt: skip


class Written:
    """A module as EDM's ``persistence`` writes one: its source, the name of its class, and its attributes."""

    def __init__(self, name: str, source: str, **state: Any) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def _fields(values: dict[str, torch.Tensor], modules: dict[str, Any]) -> dict[str, Any]:
    ordered = collections.OrderedDict
    frozen = {name for name in values if name in ("resample_filter", "freqs")}
    return {
        "training": False, "_forward_hooks": ordered(), "_non_persistent_buffers_set": set(),
        "_parameters": ordered((n, torch.nn.Parameter(v)) for n, v in values.items() if n not in frozen),
        "_buffers": ordered((n, values[n]) for n in frozen), "_modules": ordered(modules), "bias_of": None,
        "_init_args": (), "_init_kwargs": {"skip_scale": np.sqrt(0.5)},
    }  # fmt: skip


def _tree(state: dict[str, torch.Tensor], source: str, name: str = "UNetBlock", **more: Any) -> Any:
    """Flat names as nested modules; ``enc`` and ``dec`` are torch's own containers."""
    own = {n: v for n, v in state.items() if "." not in n}
    heads = dict.fromkeys(n.split(".")[0] for n in state if "." in n)
    inner = {
        h: _tree({n[len(h) + 1 :]: v for n, v in state.items() if n.startswith(f"{h}.")}, source, h) for h in heads
    }
    if name in ("enc", "dec"):
        found = torch.nn.ModuleDict()
        found._modules.update(inner)
        return found
    return Written(name, source, **(_fields(own, inner | {"absent": None}) | more))


def numbers(state: dict[str, torch.Tensor], taps: list[float]) -> dict[str, torch.Tensor]:
    """Values by name and place: waves, the same on every machine."""
    names = sorted(name for name in state if not name.endswith("resample_filter"))
    found = {}
    for i, name in enumerate(names):
        shape = state[name].shape
        wave = torch.sin(0.7 * torch.arange(shape.numel(), dtype=torch.float64) + i) * (0.2 if len(shape) > 1 else 0.5)
        found[name] = wave.view(shape).float()
    f = torch.tensor(taps, dtype=torch.float32)
    kernel = (torch.outer(f, f) / f.sum() ** 2)[None, None]
    return found | {name: kernel for name in state if name not in found}


def snapshot(
    path: Path, kind: str = "ddpmpp", labels: int = 3, source: str = "raise SystemExit", **changes: Any
) -> str:
    """Write a snapshot; gives its SHA-256. ``changes`` replace what it says of how the network was made."""
    given = {"img_resolution": 16, "img_channels": 3, "label_dim": labels} | KINDS[kind]
    design = convert.design(convert._config(given, path))
    state = numbers(network.build(design).state_dict(), given.get("resample_filter", [1, 1]))
    if "augment_dim" in given:
        state["map_augment.weight"] = torch.ones(design.width, given["augment_dim"])
    kwargs = {"_init_kwargs": given | changes.pop("kwargs", {}), "sigma_max": float("inf")}
    name = changes.pop("name", "EDMPrecond")
    wrapped = _tree({f"model.{n}": v for n, v in state.items()}, source, name, **kwargs, **changes)
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("never run")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {package.__name__: package, module.__name__: module}):
        path.write_bytes(pickle.dumps({"ema": wrapped, "dataset_kwargs": {"name": "tiny"}}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converted(folder: Path, kind: str = "ddpmpp") -> Path:
    """The file that a snapshot is converted to."""
    snapshot(folder / "net.pkl", kind)
    config, state = convert.network_of(convert.read(folder / "net.pkl"), folder / "net.pkl")
    convert._save(folder / "net.safetensors", config, state)
    return folder / "net.safetensors"
