"""Files with the three promises that the store builds on: whole writes, put-if-absent, and listing.

Every name is relative to one root, a folder or an ``s3://`` URL. A write is either there whole or not at all, also
after a crash. Storage that is away for a while is waited for (:class:`Patient`); a full or read-only disk is not.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

log = logging.getLogger("solvus")
T = TypeVar("T")

# What waiting does not mend; everything else an OSError can say about a network file system or S3 may pass.
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
_FINAL |= {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP}


class Files(Protocol):
    """What the store asks of a place."""

    def read(self, name: str) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def entries(self, folder: str) -> Iterator[tuple[str, int]]: ...
    def folders(self, folder: str) -> list[str]: ...
    def age_s(self, name: str) -> float: ...
    def write(self, name: str, data: bytes) -> None: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def delete(self, name: str) -> None: ...


def is_remote(root: str) -> bool:
    """Whether a root is a URL."""
    return "://" in root


def join(root: str, *names: str) -> str:
    """A place below a root."""
    return "/".join([root.rstrip("/"), *names])


def open_files(root: str) -> Files:
    """The files below a folder or an ``s3://`` URL."""
    if is_remote(root):
        from orchestrator.adapters.s3_files import S3Files

        return Patient(S3Files(root))
    return LocalFiles(Path(root))


class LocalFiles:
    """Files below a folder of this machine (or of a shared file system with atomic rename and hard links)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def _path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        """The bytes of a file; FileNotFoundError when there is none."""
        return self._path(name).read_bytes()

    def size(self, name: str) -> int | None:
        """Its size in bytes, or None if it is not there."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """(name below the folder, size in bytes) of every file in it (not of subfolders); nothing if absent."""
        try:
            with os.scandir(self._path(folder)) as entries:
                for entry in entries:
                    try:
                        size = entry.stat().st_size if entry.is_file() else None
                    except (
                        FileNotFoundError
                    ):  # another worker's temporary file, renamed meanwhile: the rest still counts
                        continue
                    if size is not None:
                        yield entry.name, size
        except FileNotFoundError:
            return

    def folders(self, folder: str) -> list[str]:
        """Names of the subfolders of a folder."""
        try:
            with os.scandir(self._path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            return []

    def age_s(self, name: str) -> float:
        """Seconds since it was written."""
        return time.time() - self._path(name).stat().st_mtime

    def _temporary(self, name: str, data: bytes) -> Path:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file: beside it, synced, then renamed."""
        os.replace(self._temporary(name, data), self._path(name))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists. True if this call made it: exactly one of several callers sees that."""
        temporary = self._temporary(name, data)
        try:
            os.link(temporary, self._path(name))
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        self._path(name).unlink(missing_ok=True)


class Patient:
    """Other files, with every call repeated while their place is away.

    Args:
        files: the place.
        patience_s: how long to wait in all before giving up; waits double from half a second to half a minute.

    A put-if-absent whose reply was lost may have happened: when the name then exists with our bytes, it was ours.
    """

    def __init__(self, files: Any, patience_s: float | None = None) -> None:
        self._files = files
        self._patience = float(os.environ.get("SOLVUS_PATIENCE_S", "900")) if patience_s is None else patience_s

    def __str__(self) -> str:
        return str(self._files)

    def _keep_trying(self, call: Callable[[], T]) -> T:
        deadline, wait = time.monotonic() + self._patience, 0.5
        while True:
            try:
                return call()
            except (FileNotFoundError, FileExistsError):
                raise
            except OSError as error:
                if error.errno in _FINAL or time.monotonic() + wait > deadline:
                    raise
                log.warning("storage is away, trying again in %.1f s: %s", wait, error)
                time.sleep(wait)
                wait = min(2 * wait, 30.0)

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return self._keep_trying(lambda: self._files.read(name))

    def size(self, name: str) -> int | None:
        """Its size, or None."""
        return self._keep_trying(lambda: self._files.size(name))

    def entries(self, folder: str) -> Iterator[tuple[str, int]]:
        """Names and sizes in a folder."""
        yield from self._keep_trying(lambda: [*self._files.entries(folder)])

    def folders(self, folder: str) -> list[str]:
        """Names of the subfolders."""
        return self._keep_trying(lambda: self._files.folders(folder))

    def age_s(self, name: str) -> float:
        """Seconds since it was written."""
        return self._keep_trying(lambda: self._files.age_s(name))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file."""
        self._keep_trying(lambda: self._files.write(name, data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; True if it is ours."""
        made = self._keep_trying(lambda: self._files.put_if_absent(name, data))
        return made or self._keep_trying(lambda: self._files.read(name)) == data

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        self._keep_trying(lambda: self._files.delete(name))

    def check_put_if_absent(self, name: str) -> None:
        """Refuse a place that overwrites a file which is there; two workers would both believe that they committed.

        Raises:
            ValueError: it does.
        """
        data = self.read(name)
        if self._keep_trying(lambda: self._files.put_if_absent(name, data)):
            raise ValueError(
                f"{self} ignores If-None-Match, so commits there are not safe. Use a store that honours it, or a "
                "shared folder."
            )
