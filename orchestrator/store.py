"""The store: tables on disk under content keys, complete exactly when their commit record exists.

A key's folder holds, for every committed range of sample indices, a data file ``START-STOP.ATTEMPT.parquet`` and a
commit record ``START-STOP.json`` naming it with its size, row count and SHA-256. The data file is written first, the
record last and only if absent, so whatever a crash leaves behind is an orphan that no reader follows. A second
committer of the same range discards its own file. Ranges may be of any size and may overlap; readers take every index
once.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.files import Patient, is_remote, join, open_files

FORMAT = 1
TABLES = ("rows", "columns")  # kinds that keep ranges of rows, in a folder for each key
SMALL = ("values", "recipes", "references", "artifacts", "texts")  # kinds that keep a file for each key


class CorruptShard(Exception):
    """A committed file that is not what its record says. The record has been withdrawn: make the range again."""


@dataclass(frozen=True)
class Record:
    """A commit record: the rows [start, stop) of a key are in ``file``.

    ``ledger`` is what making them cost, ``origin`` which code and machine made them.
    """

    start: int
    stop: int
    file: str
    size: int
    rows: int
    sha256: str
    ledger: dict[str, float] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """One line of JSON and one with its SHA-256, so that a flipped bit in a record is seen too."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The record.

        Raises:
            ValueError: the bytes are damaged.
        """
        text, _, rest = data.partition(b"\n")
        if rest != f"{hashlib.sha256(text).hexdigest()}\n".encode():
            raise ValueError("it does not match its checksum")
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(str(error)) from None


class Store:
    """Content-keyed tables, artifacts and values below ``<root>/store``.

    Args:
        root: a folder or an ``s3://`` URL.
        create: make the store if there is none.

    Raises:
        ValueError: the root cannot be written, holds no store, or holds one of another format version.
    """

    def __init__(self, root: str | Path, create: bool = True) -> None:
        self.root = str(root) if is_remote(str(root)) else str(Path(root).absolute())
        self.files = open_files(join(self.root, "store"))
        self._open(create)

    def _open(self, create: bool) -> None:
        try:
            text = self.files.read("FORMAT.json")
        except FileNotFoundError:
            if not create:
                raise ValueError(f"there is no store in {self.root}. Set root=DIR.") from None
            try:
                self.files.put_if_absent("FORMAT.json", json.dumps({"format": FORMAT}).encode())
                text = self.files.read("FORMAT.json")
            except OSError as error:
                raise ValueError(
                    f"root {self.root!r} cannot be written: {error.strerror or error}. Set root=DIR."
                ) from None
        except OSError as error:
            raise ValueError(f"root {self.root!r} cannot be read: {error.strerror or error}. Set root=DIR.") from None
        if isinstance(self.files, Patient):
            self.files.check_put_if_absent("FORMAT.json")
        try:
            found = json.loads(text)["format"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{self.files}/FORMAT.json is damaged. Restore it as {{"format": {FORMAT}}}.') from None
        if found != FORMAT:
            raise ValueError(
                f"{self.files} has store format {found}, this version reads format {FORMAT}. Use another root, or the "
                "version of solvus that wrote it."
            )

    @staticmethod
    def folder(kind: str, key: str) -> str:
        """Where a key's files lie."""
        return f"{kind}/{key[:2]}/{key}"

    # --- tables ------------------------------------------------------------------------------------------------------

    def committed(self, kind: str, key: str) -> list[Record]:
        """All ranges of a key, by start. A record that cannot be trusted does not count and is withdrawn."""
        folder = self.folder(kind, key)
        listing = dict(self.files.entries(folder))
        records = []
        for name in listing:
            if not name.endswith(".json"):
                continue
            try:
                record = Record.from_bytes(self.files.read(f"{folder}/{name}"))
                trusted = listing.get(record.file) == record.size and name == f"{_span(record.start, record.stop)}.json"
            except (ValueError, TypeError):
                trusted = False
            except FileNotFoundError:
                continue
            if not trusted and self._is_sound(folder, name):  # the listing may be older than the commit
                record, trusted = Record.from_bytes(self.files.read(f"{folder}/{name}")), True
            if trusted:
                records.append(record)
            else:
                self.files.delete(f"{folder}/{name}")
        return sorted(records, key=lambda r: (r.start, -r.stop))

    def first_record(self, kind: str, key: str) -> Record | None:
        """The record of a key's first range, read alone; None where there is none. For who made rows, not for them.

        Raises:
            ValueError: it is damaged.
        """
        folder = self.folder(kind, key)
        names = sorted(name for name, _ in self.files.entries(folder) if name.endswith(".json") and name[0] != ".")
        return Record.from_bytes(self.files.read(f"{folder}/{names[0]}")) if names else None

    def _is_sound(self, folder: str, name: str) -> bool:
        """Whether a record, looked at again, names a file that is there in full."""
        try:
            record = Record.from_bytes(self.files.read(f"{folder}/{name}"))
        except (FileNotFoundError, ValueError, TypeError):
            return False
        return (
            self.files.size(f"{folder}/{record.file}") == record.size
            and name == f"{_span(record.start, record.stop)}.json"
        )

    def put(
        self,
        kind: str,
        key: str,
        start: int,
        stop: int,
        table: pa.Table,
        ledger: dict[str, float],
        origin: dict[str, Any],
    ) -> bool:
        """Commit the rows [start, stop) of a key. False if somebody else already had (theirs stays)."""
        assert table.num_rows == stop - start, (table.num_rows, start, stop)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", compression_level=1, row_group_size=65536)
        data = sink.getvalue()
        folder, span = self.folder(kind, key), _span(start, stop)
        file = f"{span}.{uuid.uuid4().hex[:8]}.parquet"
        self.files.write(f"{folder}/{file}", data)
        record = Record(start, stop, file, len(data), table.num_rows, hashlib.sha256(data).hexdigest(), ledger, origin)
        made = self.files.put_if_absent(f"{folder}/{span}.json", record.to_bytes())
        if not made:
            self.files.delete(f"{folder}/{file}")
        return made

    def read(
        self, kind: str, key: str, start: int, stop: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """The rows [start, stop) of a key in index order, one table a committed range.

        Raises:
            CorruptShard: a file is damaged or missing; its record is withdrawn.
            KeyError: a part of the range is not committed.
        """
        position = start
        for record, low, high in self.used(kind, key, start, stop):
            if low > position:
                break
            yield self._load(kind, key, record, columns).slice(low - record.start, high - low)
            position = high
        if position < stop:
            raise KeyError(f"{kind} {key}: rows from {position} are not in the store")

    def used(self, kind: str, key: str, start: int, stop: int) -> Iterator[tuple[Record, int, int]]:
        """The committed ranges that [start, stop) is read from, and the rows of each; what two share comes once."""
        position = start
        for record in self.committed(kind, key):
            low, high = max(record.start, position), min(record.stop, stop)
            if low < high:
                yield record, low, high
                position = high

    def _load(self, kind: str, key: str, record: Record, columns: Sequence[str] | None) -> pa.Table:
        folder = self.folder(kind, key)
        try:
            data = self.files.read(f"{folder}/{record.file}")
            if hashlib.sha256(data).hexdigest() == record.sha256:
                # Leaves out columns that the file lacks, where read_table would refuse. Without threads: Arrow's own,
                # beside torch's, now and then end the process with an abort when it exits.
                wanted = None if columns is None else list(columns)
                return pq.ParquetFile(io.BytesIO(data)).read(wanted, use_threads=False)
        except FileNotFoundError:
            pass
        self.withdraw(kind, key, record)
        raise CorruptShard(f"{folder}/{record.file} is damaged; rows {record.start}-{record.stop} will be made again.")

    def withdraw(self, kind: str, key: str, record: Record) -> None:
        """Forget a range: its record first, then its file."""
        folder = self.folder(kind, key)
        self.files.delete(f"{folder}/{_span(record.start, record.stop)}.json")
        self.files.delete(f"{folder}/{record.file}")

    def verify(self, withdraw: bool = False) -> tuple[dict[str, int], list[str]]:
        """Read every byte that is kept, apart from states: these are a cache, and looked at when they are used.

        Args:
            withdraw: forget what is damaged, so that the next run makes it again.

        Returns:
            counts of files and bytes read, and one line for everything that is wrong.
        """
        counts: dict[str, int] = {"files": 0, "bytes": 0}
        wrong: list[str] = []
        for kind, key in self._keys(*TABLES):
            wrong += self._verify_key(kind, key, counts, withdraw)
        for folder in self._small_folders():
            kind = folder.split("/")[0]
            damaged: set[str] = set()
            for name, size in list(self.files.entries(folder)):
                key, _, ending = name.partition(".")
                counts["files"] += 1
                counts["bytes"] += size
                get = self.get_json if ending == "json" else self.get_arrays
                if not name.startswith(".tmp-") and get(kind, key) is None:
                    wrong.append(f"{folder}/{name}: damaged")
                    damaged.add(key)
            if withdraw:
                # An artifact has two files and is there when its arrays are: without these it is made again whole.
                for name in (f"{folder}/{key}{ending}" for key in damaged for ending in (".safetensors", ".json")):
                    self.files.delete(name)
        for _, key in self._keys("quarantine"):
            folder = self.folder("quarantine", key)
            for name, size in list(self.files.entries(folder)):
                counts["files"] += 1
                counts["bytes"] += size
                if not name.startswith(".tmp-") and self._set_aside(f"{folder}/{name}") is None:
                    wrong.append(f"{folder}/{name}: damaged; its row will be tried again")
                    if withdraw:
                        self.files.delete(f"{folder}/{name}")
        return counts, wrong

    def _keys(self, *kinds: str) -> Iterator[tuple[str, str]]:
        """Every key of some kinds that keep a folder a key."""
        for kind in kinds:
            for prefix in self.files.folders(kind):
                for key in self.files.folders(f"{kind}/{prefix}"):
                    yield kind, key

    def _small_folders(self) -> Iterator[str]:
        """The folders of all kinds that keep a file a key."""
        for kind in SMALL:
            for prefix in self.files.folders(kind):
                yield f"{kind}/{prefix}"

    def _verify_key(self, kind: str, key: str, counts: dict[str, int], withdraw: bool) -> Iterator[str]:
        folder = self.folder(kind, key)
        for name, size in list(self.files.entries(folder)):
            if not name.endswith(".json"):
                continue
            counts["files"] += 1
            counts["bytes"] += size
            try:
                record = Record.from_bytes(self.files.read(f"{folder}/{name}"))
                if name != f"{_span(record.start, record.stop)}.json":
                    raise ValueError("it names another range")
            except (ValueError, TypeError) as error:
                yield f"{folder}/{name}: commit record damaged ({error})"
                if withdraw:
                    self.files.delete(f"{folder}/{name}")
                continue
            try:
                data = self.files.read(f"{folder}/{record.file}")
            except FileNotFoundError:
                yield f"{folder}/{record.file}: missing"
            else:
                counts["files"] += 1
                counts["bytes"] += len(data)
                if len(data) == record.size and hashlib.sha256(data).hexdigest() == record.sha256:
                    continue
                yield f"{folder}/{record.file}: {len(data)} bytes do not match their checksum"
            if withdraw:
                self.withdraw(kind, key, record)

    def collect_garbage(self, older_than_s: float, dry_run: bool, release: bool = False) -> dict[str, int]:
        """Remove what no commit record names.

        Args:
            older_than_s: spare younger files: a worker may be about to commit them.
            dry_run: only count.
            release: also take rows out of quarantine.
        """
        gone = {"files": 0, "bytes": 0, "released": 0}
        for path, size in self._orphans():
            try:
                if self.files.age_s(path) < older_than_s:
                    continue
            except FileNotFoundError:
                continue  # committed or removed meanwhile
            gone["files"] += 1
            gone["bytes"] += size
            if not dry_run:
                self.files.delete(path)
        if release:
            for _, key in self._keys("quarantine"):
                gone["released"] += len(self.quarantined(key)) if dry_run else self.release(key)
        return gone

    def _orphans(self) -> Iterator[tuple[str, int]]:
        """Files that no commit record names, and what writers left that died, with their sizes."""
        for kind, key in self._keys(*TABLES):
            folder = self.folder(kind, key)
            named = {record.file for record in self.committed(kind, key)}
            for name, size in list(self.files.entries(folder)):
                if name not in named and (name.startswith(".tmp-") or not name.endswith(".json")):
                    yield f"{folder}/{name}", size
        folders = (self.folder("quarantine", key) for _, key in self._keys("quarantine"))
        for folder in (*self._small_folders(), *folders):
            for name, size in list(self.files.entries(folder)):
                if name.startswith(".tmp-"):
                    yield f"{folder}/{name}", size

    # --- quarantine --------------------------------------------------------------------------------------------------

    def quarantine(self, key: str, index: int, reason: str) -> None:
        """Set a row aside for good: it counts as done, is reported, and is never tried again."""
        data = json.dumps({"index": index, "reason": reason}).encode()
        self.files.put_if_absent(f"{self.folder('quarantine', key)}/{index:010d}.json", data)

    def quarantined(self, key: str) -> dict[int, str]:
        """Rows of a key that were set aside, with their reasons."""
        folder, found = self.folder("quarantine", key), {}
        for name, _ in self.files.entries(folder):
            if name.startswith(".tmp-"):
                continue
            if (entry := self._set_aside(f"{folder}/{name}")) is None:
                self.files.delete(f"{folder}/{name}")
            else:
                found[entry[0]] = entry[1]
        return dict(sorted(found.items()))

    def _set_aside(self, path: str) -> tuple[int, str] | None:
        """Index and reason of a row in quarantine; None where the entry is damaged."""
        try:
            entry = json.loads(self.files.read(path))
            return int(entry["index"]), str(entry["reason"])
        except (ValueError, KeyError, TypeError):
            return None

    def release(self, key: str) -> int:
        """Take all rows of a key out of quarantine; how many there were."""
        folder = self.folder("quarantine", key)
        names = [name for name, _ in self.files.entries(folder)]
        for name in names:
            self.files.delete(f"{folder}/{name}")
        return len(names)

    # --- small things ------------------------------------------------------------------------------------------------

    def get_json(self, kind: str, key: str) -> Any | None:
        """A small value, or None if it is not there or damaged."""
        try:
            text = json.loads(self.files.read(f"{self.folder(kind, key)}.json"))
            return text["value"] if text["sha256"] == _sha(text["value"]) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put_json(self, kind: str, key: str, value: Any) -> None:
        """Keep a small value under its key."""
        text = json.dumps({"sha256": _sha(value), "value": value})
        self.files.write(f"{self.folder(kind, key)}.json", text.encode())

    def get_arrays(self, kind: str, key: str) -> dict[str, Any] | None:
        """Arrays kept with :meth:`put_arrays`, or None."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = self.files.read(f"{self.folder(kind, key)}.safetensors")
            digest, body = data[:64], data[64:]
            return load(body) if hashlib.sha256(body).hexdigest().encode() == digest else None
        except (FileNotFoundError, SafetensorError):
            return None

    def put_arrays(self, kind: str, key: str, arrays: dict[str, Any]) -> None:
        """Keep named numpy arrays (safetensors with a checksum in front)."""
        import numpy as np
        from safetensors.numpy import save

        body = save({name: np.array(value, order="C") for name, value in arrays.items()})
        self.files.write(f"{self.folder(kind, key)}.safetensors", hashlib.sha256(body).hexdigest().encode() + body)


def _span(start: int, stop: int) -> str:
    return f"{start:010d}-{stop:010d}"


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
