"""Pictures that samples are compared with: a folder, an array or a Parquet file, read a few at a time.

A picture of another size than the samples is cropped to their proportions about its middle, then resized with Pillow's
bicubic filter; grey ones get three equal colours where samples have colours, and the reverse.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tasks.checkpoint import file_digest
from tasks.recipe import digest
from tasks.types import sample_shape

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ARRAYS = (".npy", ".npz")
PREPARATION = "1"  # what is done to a picture: of its identity


class ImageData:
    """Pictures at a place, as an array that reads what it is asked for: (N, C, H, W) float32 in [-1, 1].

    Args:
        path: a folder of pictures (PNG, JPEG, WebP, BMP), in which subfolders are labels, in the order of their names;
            an .npy or .npz file of 8-bit pictures (N, H, W, C) or (N, H, W), the first array of several, labels
            second; or a .parquet file with a column ``image`` of encoded pictures and, if there are any, ``label``.
        shape: (C, H, W) of the samples.

    Attributes:
        labels: (N,) int64; zeros where there are none.

    Raises:
        ValueError: there is no such place, no picture in it, or a file that cannot be read.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, path: str, shape: tuple[int, ...]) -> None:
        place = Path(path).expanduser()
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(f"model.data holds pictures, but samples have shape {tuple(shape)}. Leave it out.")
        if place.is_dir():
            self._source: Any = _Folder(place)
        elif place.is_file() and place.suffix in ARRAYS:
            self._source = _Array(place)
        elif place.is_file() and place.suffix == ".parquet":
            self._source = _Table(place)
        else:
            raise ValueError(
                f"model.data {path!r} is no folder of pictures, and no {', '.join(ARRAYS)} or .parquet file. Give one."
            )
        if not len(self._source.labels):
            raise ValueError(f"model.data {path!r} holds no picture ({', '.join(PICTURES)}). Give a folder with some.")
        self._place, self._shape = place, tuple(shape)

    @property
    def labels(self) -> np.ndarray:
        """Of every picture."""
        return self._source.labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.labels), *self._shape)

    @cached_property
    def identity(self) -> str:
        """Hash of what is there and of what is done to it; of a folder by names, sizes and times of change alone."""
        return digest([PREPARATION, list(self._shape), self._source.identity])[:16]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Any) -> np.ndarray:
        """Those pictures, (B, C, H, W): a slice, or whole numbers."""
        chosen = np.atleast_1d(np.arange(len(self))[which])
        found = np.empty((len(chosen), *self._shape), dtype=np.float32)
        for row, i in enumerate(chosen):
            try:
                found[row] = self._prepared(self._source.picture(int(i)))
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow says of a file that is no picture
                raise ValueError(f"picture {i} of {self._place} cannot be read: {error}. Take it out.") from None
        return found

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """All of them."""
        return self[:].astype(dtype or np.float32, copy=False)

    def _prepared(self, picture: Any) -> np.ndarray:
        from PIL import Image

        channels, height, width = self._shape
        picture = picture.convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            scale = min(picture.width / width, picture.height / height)
            wide, high = round(width * scale), round(height * scale)
            left, top = (picture.width - wide) // 2, (picture.height - high) // 2
            # Cropped first: the filter would look beyond the edge of a box.
            picture = picture.crop((left, top, left + wide, top + high))
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        values = np.asarray(picture, dtype=np.float32).reshape(height, width, channels)
        return values.transpose(2, 0, 1) / 127.5 - 1.0


def open_data(path: str, shape: tuple[int, ...]) -> ImageData:
    """The pictures at a place, listed once a process for as long as the place is not changed."""
    place = Path(path).expanduser()
    return _listed(path, shape, place.stat().st_mtime_ns if place.exists() else 0)


@lru_cache(maxsize=8)
def _listed(path: str, shape: tuple[int, ...], mtime_ns: int) -> ImageData:
    return ImageData(path, shape)


class JudgedByPictures:
    """What a model answers whose samples are compared with pictures that its user has: the place is ``data``."""

    data: str | None

    def pictures(self) -> ImageData:
        """The pictures.

        Raises:
            ValueError: none were given, or there are none at the place.
        """
        if self.data is None:
            raise ValueError(
                f"model {self.name} brings no data to compare samples with. Set model.data to a folder of pictures, "  # type: ignore[attr-defined]
                "or leave out metrics that compare with data."
            )
        return open_data(str(self.data), sample_shape(self))

    def check_data(self) -> None:
        """Refuse a model without data, or with data that cannot be read, before anything is sampled."""
        self.pictures()

    @property
    def data_identity(self) -> str | None:
        """Of the pictures; None without any."""
        return None if self.data is None else self.pictures().identity

    def reference(self, count: int = 0) -> tuple[Any, Any]:
        """All pictures, (N, C, H, W), read when they are asked for, and their labels."""
        found = self.pictures()
        return found, found.labels


class _Folder:
    def __init__(self, place: Path) -> None:
        from PIL import Image

        self._files = sorted(p for p in place.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        groups = [file.relative_to(place).parts[0] if file.parent != place else "" for file in self._files]
        self.labels = np.unique(groups, return_inverse=True)[1].astype(np.int64) if groups else np.zeros(0, np.int64)
        self._place = place
        for file in self._files:
            try:
                Image.open(file).close()  # its header alone
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"model.data: {file} cannot be read as a picture: {error}. Take it out.") from None

    @property
    def identity(self) -> str:
        whole = hashlib.sha256()
        for file in self._files:
            stat = file.stat()
            whole.update(f"{file.relative_to(self._place)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return whole.hexdigest()

    def picture(self, i: int) -> Any:
        from PIL import Image

        return Image.open(self._files[i])


class _Array:
    def __init__(self, place: Path) -> None:
        try:
            arrays = _arrays(place)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.data {place} cannot be read: {error}.") from None
        pictures = arrays[0] if arrays else np.zeros(0)
        if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
            raise ValueError(
                f"model.data {place} must hold 8-bit pictures (N, H, W, C) first, got {pictures.dtype} of shape "
                f"{pictures.shape}."
            )
        labels = arrays[1] if len(arrays) > 1 and arrays[1].shape == (len(pictures),) else np.zeros(len(pictures))
        is_grey = pictures.shape[3:] == (1,)
        self._pictures: Any = pictures[..., 0] if is_grey else pictures
        self.labels = labels.astype(np.int64)
        self.identity = file_digest(place)

    def picture(self, i: int) -> Any:
        from PIL import Image

        return Image.fromarray(np.ascontiguousarray(self._pictures[i]))


def _arrays(place: Path) -> list[Any]:
    """The first two arrays of a file; one of its own stays on disk."""
    if place.suffix == ".npy":
        return [np.load(place, mmap_mode="r", allow_pickle=False)]
    if not zipfile.is_zipfile(place):
        raise ValueError("it is no .npz file, or was cut short")
    with np.load(place, allow_pickle=False) as found:
        return [found[name] for name in found.files[:2]]


class _Table:
    def __init__(self, place: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = pq.read_schema(place).names
            if "image" not in names:
                raise ValueError(f"it has no column image, but {', '.join(names)}")
            wanted = ["image", *(["label"] if "label" in names else [])]
            table = pq.ParquetFile(place).read(wanted, use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"model.data {place} cannot be read: {error}.") from None
        self._images = table["image"]
        known = table["label"].to_numpy() if "label" in names else np.zeros(len(table))
        self.labels, self.identity = np.asarray(known).astype(np.int64), file_digest(place)

    def picture(self, i: int) -> Any:
        from PIL import Image

        held = self._images[i].as_py()
        return Image.open(io.BytesIO(held["bytes"] if isinstance(held, dict) else held))
