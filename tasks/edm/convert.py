"""A network pickle of EDM, once and for all, as safetensors with the network's design beside the numbers."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.checkpoint import file_digest
from tasks.edm.network import Design, build
from tasks.edm.network import fields as design_fields
from tasks.edm.records import Record, read
from tasks.pretrained import home

_NAMES = {
    "img_resolution": "size", "img_channels": "channels", "label_dim": "label_dim", "augment_dim": "augment_dim",
    "model_type": "kind", "model_channels": "width", "channel_mult": "multiples", "channel_mult_emb": "emb_multiple",
    "num_blocks": "blocks", "attn_resolutions": "attention", "embedding_type": "embedding",
    "channel_mult_noise": "noise_multiple", "encoder_type": "encoder", "decoder_type": "decoder",
    "resample_filter": "taps",
}  # fmt: skip
_IDLE = ("dropout", "use_fp16", "sigma_min", "sigma_max", "resample_filter")  # of training, or of kernels
_ADM = {"width": 192, "multiples": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8)}
_CHOICES = {
    "kind": ("SongUNet", "DhariwalUNet"), "embedding": ("positional", "fourier"),
    "encoder": ("standard", "skip", "residual"), "decoder": ("standard", "skip"),
}  # fmt: skip


def converted(path: Path, sha256: str) -> Path:
    """The safetensors file of a pickle, made where there is none yet below ``$SOLVUS_WEIGHTS``.

    Args:
        path: the pickle.
        sha256: what its content must hash to, 64 hexadecimal digits.

    Raises:
        ValueError: another content, or not a network with EDM's preconditioning.
    """
    found = file_digest(path)
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, but model.sha256 is {sha256}. Fetch the file again, or pin the one you mean."
        )
    target = home() / "edm" / f"{sha256}.safetensors"
    if not target.is_file():
        config, state = network_of(read(path), path)
        _save(target, config, state)
    return target


def network_of(data: Any, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and float32 weights of the network in a snapshot, checked against the network that they are for.

    Raises:
        ValueError: another kind of network, or weights that do not fit.
    """
    found = data.get("ema") if isinstance(data, dict) else data
    if not isinstance(found, Record) or found.name != "EDMPrecond":
        name = found.name if isinstance(found, Record) else type(found).__name__
        raise ValueError(
            f"{path} holds a {name}, not a network with EDM's preconditioning (EDMPrecond). Of the networks that EDM "
            "publishes, those named edm-* have it, those named baseline-* do not."
        )
    given = found.fields.get("_init_kwargs")
    if not isinstance(given, dict) or found.fields.get("_init_args"):
        raise ValueError(f"{path} does not say how its network was made (_init_kwargs).")
    config = _config(given, path)
    state = {name.removeprefix("model."): value.float() for name, value in found.tensors().items()}
    state.pop("map_augment.weight", None)
    wanted = {name: tuple(value.shape) for name, value in build(design(config)).state_dict().items()}
    odd = sorted(
        name for name in {*wanted, *state} if name not in state or wanted.get(name) != tuple(state[name].shape)
    )
    if odd:
        raise ValueError(f"{path}: {len(odd)} tensors are missing, left over or of another shape, such as {odd[0]}.")
    return config, state


def _config(given: dict[str, Any], path: Path) -> dict[str, Any]:
    unknown = sorted(set(given) - set(_NAMES) - set(_IDLE) - {"sigma_data", "label_dropout"})
    kind = given.get("model_type", "DhariwalUNet")
    if unknown:
        raise ValueError(f"{path}: its network was made with {', '.join(unknown)}, which is not known here.")
    made = {"kind": kind} | (_ADM if kind == "DhariwalUNet" else {})
    made |= {_NAMES[name]: value for name, value in given.items() if name in _NAMES}
    for name, allowed in _CHOICES.items():
        if made.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{path}: its network's {name} is {made[name]!r}; known: {', '.join(allowed)}.")
    data = asdict(Design(**design_fields(made)))
    return {"design": data, "sigma_data": float(given.get("sigma_data", 0.5)),
            "label_dropout": float(given.get("label_dropout", 0.0))}  # fmt: skip


def design(config: dict[str, Any]) -> Design:
    """The design in a converted file's settings."""
    return Design(**design_fields(config["design"]))


def _save(target: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # whole or not at all: others may look meanwhile
        part = Path(folder) / target.name
        save_file({name: value.contiguous().clone() for name, value in state.items()}, part,
                  metadata={"edm": json.dumps(config, sort_keys=True)})  # fmt: skip
        os.replace(part, target)


def settings(path: Path) -> dict[str, Any]:
    """What a converted file says of its network, without reading the weights.

    Raises:
        ValueError: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})["edm"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is no converted network of EDM: {error!r}. Give the pickle with its model.sha256, and it is made."
        ) from None


def located(path: str, sha256: str) -> Path:
    """The converted file of what a user named.

    Raises:
        ValueError: nothing there, another kind of file, or a pickle without its hash.
    """
    place = Path(path).expanduser()
    if not place.is_file() or place.suffix not in (".pkl", ".safetensors"):
        raise ValueError(
            f"model.path {path!r} must be a network pickle of EDM (.pkl), or one converted (.safetensors)."
        )
    if place.suffix == ".safetensors":
        return place
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(
            f"{path} is a pickle. It is read as data and converted once, none of its code is run, but only when its "
            f"content is pinned: set model.sha256 to its 64 hexadecimal digits, got {sha256!r} (sha256sum FILE)."
        )
    return converted(place, sha256)


def load(path: Path, device: str) -> torch.nn.Module:
    """The network of a converted file on a device, in evaluation mode.

    Raises:
        ValueError: weights that do not fit.
    """
    from safetensors.torch import load_file

    network = build(design(settings(path)))
    try:
        network.load_state_dict(load_file(path, device=device), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its network: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)
