"""Kept states of trajectories below ``<root>/store/states``: a cache of bounded size, never the truth.

A file is written beside and renamed, without syncing: a state that is lost is made again. Each carries its checksum,
and one that is damaged or gone is simply not there. When the cache outgrows its bound, the states that were not used
for longest go first. Any number of workers may read, write and evict at once.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np


class StateCache:
    """States of one store.

    Args:
        root: the study's root, a folder.
        max_bytes: the bound.
    """

    def __init__(self, root: str, max_bytes: int) -> None:
        self._folder, self._max = Path(root) / "store" / "states", max_bytes
        self._size: int | None = None
        self.reused = 0

    def _path(self, key: str, first: int) -> Path:
        return self._folder / key[:2] / f"{key}.{first}.safetensors"

    def load(self, key: str, first: int) -> Mapping[str, np.ndarray] | None:
        """A state, or None if it is not there, or not sound."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = self._path(key, first)
        try:
            data = path.read_bytes()
            if hashlib.blake2b(data[32:], digest_size=32).digest() != data[:32]:
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
            return load(data[32:])
        except (OSError, SafetensorError):
            return None

    def save(self, key: str, first: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a state; a disk that is full only means that it is not kept."""
        from safetensors.numpy import save

        body = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
        data = hashlib.blake2b(body, digest_size=32).digest() + body
        if len(data) > self._max:
            return
        path = self._path(key, first)
        beside = path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(data)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            return
        self._size = self.size() if self._size is None else self._size + len(data)
        if self._size > self._max:
            self._evict()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for path in self._folder.glob("*/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # another worker was quicker
            yield found.st_mtime, found.st_size, path

    def size(self) -> int:
        """Bytes of all states."""
        return sum(size for _, size, _ in self._files())

    def _evict(self) -> None:
        """Make room: down to nine tenths of the bound, the longest unused first."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= 0.9 * self._max:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._size = total

    def clear(self, dry_run: bool = False) -> tuple[int, int]:
        """Drop all states; (files, bytes)."""
        files = list(self._files())
        if not dry_run:
            for _, _, path in files:
                path.unlink(missing_ok=True)
        return len(files), sum(size for _, size, _ in files)
