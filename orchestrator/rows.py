"""Columns of samples as Arrow tables that Hugging Face datasets shows as images, and back."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

# Below this many numbers a sample the clean state itself is kept too: exact scores and trajectory errors need it, and
# it costs no more than the picture.
MAX_KEPT_SIZE = 4096


def _encode(pixels: np.ndarray) -> bytes:
    """One picture, (C, H, W) of 8 bits with C = 1 or 3, as a PNG."""
    from PIL import Image

    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] to 8 bits, of any shape; what lies outside is clipped."""
    return np.clip(np.rint((images.astype(np.float64) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def as_stored(x0: np.ndarray, kind: str) -> np.ndarray:
    """Samples as a later reader will see them: large images only to 8 bits, so a score is the same now and then."""
    if kind == "image" and x0[0].size > MAX_KEPT_SIZE:
        return to_bytes(x0).astype(np.float32) / 127.5 - 1.0
    return x0


def decode_png(data: bytes) -> np.ndarray:
    """The inverse up to 8 bits: (C, H, W) float32 in [-1, 1]."""
    from PIL import Image

    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32)
    return (pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)) / 127.5 - 1.0


def _list(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def to_table(columns: Mapping[str, np.ndarray], kind: str, constants: Mapping[str, Any]) -> pa.Table:
    """Rows as a table.

    Args:
        columns: what ``generate`` returns.
        kind: the model's: "image" adds an ``image`` column.
        constants: what all rows share (recipe key, seed, model revision, device, dtype), as repeated columns.
    """
    data = {}
    count = len(columns["sample_id"])
    for name, value in columns.items():
        if name == "x0":
            if kind == "image":
                pictures = pa.array([_encode(pixels) for pixels in to_bytes(value)], pa.binary())
                paths = pa.nulls(count, pa.string())
                data["image"] = pa.StructArray.from_arrays([pictures, paths], names=["bytes", "path"])
            if kind != "image" or value[0].size <= MAX_KEPT_SIZE:
                data["x0"] = _list(value)
        else:
            data[name] = pa.array(value) if value.ndim == 1 else _list(value)
    for name, constant in constants.items():
        data[name] = (
            pa.array([constant] * count).dictionary_encode()
            if isinstance(constant, str)
            else pa.array(np.full(count, constant))
        )
    table = pa.table(data)
    if kind == "image":
        features = {f.name: _feature(f) for f in table.schema}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


def _feature(column: pa.Field) -> dict[str, Any]:
    if column.name == "image":
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(column.type):
        inner = {
            "dtype": str(column.type.value_type)
            .replace("double", "float64")
            .replace("float", "float32")
            .replace("float3264", "float64"),
            "_type": "Value",
        }
        return {"feature": inner, "length": column.type.list_size, "_type": "List"}
    value = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return {"dtype": {"float": "float32", "double": "float64"}.get(str(value), str(value)), "_type": "Value"}


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A number column as (B,), a list column as (B, D)."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=False)


def samples(table: pa.Table, shape: tuple[int, ...]) -> np.ndarray:
    """The samples of a table, (B, *shape): the kept states, or else the decoded pictures."""
    if "x0" in table.column_names:
        return to_numpy(table["x0"]).reshape(table.num_rows, *shape)
    return np.stack([decode_png(item["bytes"]) for item in table["image"].to_pylist()])


def column_table(values: np.ndarray, start: int) -> pa.Table:
    """A scorer's column over consecutive rows."""
    ids = np.arange(start, start + len(values), dtype=np.int64)
    return pa.table({"sample_id": ids, "value": pa.array(values) if values.ndim == 1 else _list(values)})
