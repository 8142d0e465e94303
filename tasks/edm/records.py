"""Reading a network pickle of EDM as data: nothing that it names is imported or run.

Such a file holds, for every module, the source code of its class beside its name, arguments and tensors. A reader that
follows it would run that code. This one knows a handful of constructors, each replaced by one of its own that only
keeps what it is given; source code is thrown away, and any other name is an error.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Record:
    """A module as it was written down.

    Attributes:
        name: of its class.
        fields: its attributes; ``_parameters``, ``_buffers`` and ``_modules`` are torch's.
    """

    name: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers of this module and of those inside, by their dotted names."""
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            held = self.fields.get(kind, {})
            found |= {prefix + name: value for name, value in held.items() if isinstance(value, Tensor)}
        for name, inner in self.fields.get("_modules", {}).items():
            if isinstance(inner, Record):
                found |= inner.tensors(f"{prefix}{name}.")
        return found


class _Container(Record):
    """One of torch's own modules that holds others."""


class _Fields(dict):  # type: ignore[type-arg]
    """A mapping whose items can be read as attributes, where it was written."""


def _module(meta: Any) -> Record:
    """A module of a class whose source lies beside it."""
    return Record(str(meta["class_name"]), dict(meta["state"]))


def _storage(data: bytes) -> Any:
    """Numbers, in torch's own file format inside of the pickle."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    numbers = torch.empty(0, dtype=storage.dtype)
    return numbers.set_(storage._untyped_storage, offset, tuple(size), tuple(stride)).clone()


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"a number of type {dtype}")
    return np.frombuffer(data, dtype=dtype, count=1)[0].item()


def _dtype(name: str, *_: Any) -> np.dtype:
    return np.dtype(str(name))


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("dnnlib.util", "EasyDict"): _Fields,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("torch.nn.modules.container", "ModuleList"): _Container,
    ("torch.nn.modules.container", "Sequential"): _Container,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "dtype"): _dtype,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no network of EDM needs")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside of it")


def read(path: Path) -> Any:
    """What a pickle holds, with records in place of modules.

    Raises:
        ValueError: it is damaged, or names anything but the parts of such a network.
    """
    try:
        with open(path, "rb") as file:
            return _Reader(file).load()
    except Exception as error:  # a pickle can fail in any way
        raise ValueError(f"{path} cannot be read as a network pickle of EDM: {error}.") from None
