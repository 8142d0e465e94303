"""The store: committed means readable and whole; everything else does not exist."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.files import LocalFiles
from orchestrator.plan import covered, missing
from orchestrator.store import FORMAT, SMALL, TABLES, CorruptShard, Record, Store

KEY = "ab" * 16


def numbers(start: int, stop: int, offset: float = 0.0) -> pa.Table:
    ids = np.arange(start, stop)
    return pa.table({"sample_id": ids, "value": ids * 0.5 + offset})


def put(store: Store, start: int, stop: int, offset: float = 0.0, kind: str = "rows", key: str = KEY) -> bool:
    return store.put(kind, key, start, stop, numbers(start, stop, offset), {"rows": stop - start}, {"commit": "c"})


def ids(store: Store, start: int, stop: int, key: str = KEY) -> list[int]:
    return [i for table in store.read("rows", key, start, stop) for i in table["sample_id"].to_pylist()]


def folder(store: Store, kind: str = "rows", key: str = KEY) -> Path:
    return store.files.root / store.folder(kind, key)


def only(store: Store, pattern: str) -> Path:
    (path,) = folder(store).glob(pattern)
    return path


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


# --- commit and read -------------------------------------------------------------------------------------------------


def test_what_is_put_is_read_back_with_its_record(store: Store) -> None:
    assert put(store, 3, 9)
    (table,) = store.read("rows", KEY, 3, 9)
    assert table.equals(numbers(3, 9))
    (record,) = store.committed("rows", KEY)
    assert (record.start, record.stop, record.rows) == (3, 9, 6)
    assert (record.ledger, record.origin) == ({"rows": 6}, {"commit": "c"})


def test_a_part_of_a_range_and_some_columns_can_be_read(store: Store) -> None:
    put(store, 0, 10)
    (table,) = store.read("rows", KEY, 4, 6, ["value"])
    assert table.equals(numbers(4, 6).select(["value"]))


def test_a_second_committer_discards_its_own_file(store: Store) -> None:
    assert put(store, 0, 4, offset=0.0)
    assert not put(store, 0, 4, offset=100.0)
    assert len(list(folder(store).iterdir())) == 2  # one record, one data file
    (table,) = store.read("rows", KEY, 0, 4)
    assert table.equals(numbers(0, 4))


def test_a_missing_part_of_a_range_is_an_error_and_never_a_shorter_answer(store: Store) -> None:
    put(store, 0, 4)
    put(store, 6, 10)
    with pytest.raises(KeyError, match="from 4"):
        ids(store, 0, 10)
    with pytest.raises(KeyError, match="from 10"):
        ids(store, 6, 12)


@settings(max_examples=25, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 15)), min_size=1, max_size=6),
    start=st.integers(0, 30),
    length=st.integers(1, 20),
)
def test_overlapping_ranges_are_read_once_per_index_or_refused(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]], start: int, length: int
) -> None:
    store, stop = Store(tmp_path_factory.mktemp("overlap")), start + length
    for low, size in ranges:
        put(store, low, low + size)
    there = {i for low, size in ranges for i in range(low, low + size)}
    gaps = missing(start, stop, covered(store.committed("rows", KEY)))
    assert {i for low, high in gaps for i in range(low, high)} == set(range(start, stop)) - there
    if set(range(start, stop)) <= there:
        assert ids(store, start, stop) == list(range(start, stop))
    else:
        with pytest.raises(KeyError):
            ids(store, start, stop)


def test_exactly_one_of_many_threads_commits(store: Store) -> None:
    count = 12
    barrier, won = threading.Barrier(count), []

    def work(number: int) -> None:
        barrier.wait()
        if put(store, 0, 4, offset=number):
            won.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    (table,) = store.read("rows", KEY, 0, 4)
    assert table.equals(numbers(0, 4, offset=won[0]))
    assert len(list(folder(store).iterdir())) == 2


def test_put_if_absent_lets_exactly_one_of_many_processes_win(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from orchestrator.files import LocalFiles\n"
        "root, me = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "(root / f'ready-{me}').touch()\n"
        "while not (root / 'go').exists(): time.sleep(0.001)\n"
        "won = [name for name in map(str, range(40)) if LocalFiles(root / 'files').put_if_absent(name, me.encode())]\n"
        "print(' '.join(won))"
    )
    count = 4
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    while len(list(tmp_path.glob("ready-*"))) < count:
        assert all(process.poll() is None for process in processes)
    (tmp_path / "go").touch()
    won = {str(i): process.communicate(timeout=30)[0].split() for i, process in enumerate(processes)}
    assert sorted(int(name) for names in won.values() for name in names) == list(range(40))
    for me, names in won.items():
        assert all(LocalFiles(tmp_path / "files").read(name).decode() == me for name in names)
    assert not list((tmp_path / "files").glob(".tmp-*"))


# --- what must not be trusted ----------------------------------------------------------------------------------------


def test_an_orphan_data_file_and_a_stray_temporary_file_do_not_exist_for_readers(store: Store) -> None:
    put(store, 0, 4)
    data = only(store, "*.parquet")
    (data.parent / "0000000004-0000000008.deadbeef.parquet").write_bytes(data.read_bytes())
    (data.parent / ".tmp-0123").write_bytes(b"half a fi")
    assert [(r.start, r.stop) for r in store.committed("rows", KEY)] == [(0, 4)]
    with pytest.raises(KeyError):
        ids(store, 0, 8)
    assert put(store, 4, 8)
    assert ids(store, 0, 8) == list(range(8))
    assert store.verify()[1] == []


def _truncate_record(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "record without data": ("*.parquet", Path.unlink),
    "truncated parquet": ("*.parquet", lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "zero-byte data": ("*.parquet", lambda path: path.write_bytes(b"")),
    "flipped bit in the data": ("*.parquet", lambda path: flip(path, path.stat().st_size // 2)),
    "flipped bit in the checksum": ("*.json", lambda path: flip(path, path.read_bytes().index(b'"sha256": "') + 12)),
    "zero-byte record": ("*.json", lambda path: path.write_bytes(b"")),
    "half a JSON": ("*.json", _truncate_record),
    "record that is a list": ("*.json", lambda path: path.write_text("[1, 2]")),
    "record of another range": (
        "*.json",
        lambda path: path.write_bytes(replace(Record.from_bytes(path.read_bytes()), start=0, stop=99).to_bytes()),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_never_read_and_its_range_is_missing_again(store: Store, name: str) -> None:
    put(store, 0, 8)
    put(store, 8, 16)
    pattern, damage = DAMAGE[name]
    damage(only(store, f"0000000000-0000000008{pattern}"))
    with pytest.raises((CorruptShard, KeyError)):
        ids(store, 0, 16)
    assert missing(0, 16, covered(store.committed("rows", KEY))) == [(0, 8)]
    assert put(store, 0, 8)
    assert ids(store, 0, 16) == list(range(16))


def test_a_flipped_bit_of_the_data_says_corrupt_and_withdraws_the_record(store: Store) -> None:
    put(store, 0, 8)
    flip(only(store, "*.parquet"), 60)
    with pytest.raises(CorruptShard, match="rows 0-8 will be made again"):
        ids(store, 0, 8)
    assert store.committed("rows", KEY) == []
    assert list(folder(store).iterdir()) == []


def test_no_flipped_bit_anywhere_in_the_data_is_read(store: Store) -> None:
    put(store, 0, 4)
    record, data = only(store, "*.json"), only(store, "*.parquet")
    whole = {path: path.read_bytes() for path in (record, data)}
    for position in range(0, len(whole[data]), 29):
        for path, content in whole.items():
            path.write_bytes(content)
        flip(data, position)
        with pytest.raises(CorruptShard):
            ids(store, 0, 4)


def test_no_flipped_bit_anywhere_in_a_record_gives_other_rows(store: Store) -> None:
    put(store, 0, 4)
    record, data = only(store, "*.json"), only(store, "*.parquet")
    whole = {path: path.read_bytes() for path in (record, data)}
    noticed = 0
    for position in range(0, len(whole[record]), 5):
        for path, content in whole.items():
            path.write_bytes(content)
        flip(record, position)
        try:
            (table,) = store.read("rows", KEY, 0, 4)
        except (CorruptShard, KeyError):
            noticed += 1
        else:
            assert table.equals(numbers(0, 4))
    assert noticed > 20


def test_a_listing_that_began_before_a_commit_does_not_withdraw_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A directory scan may miss a file that was added while it ran, and yet see one that was added after that.
    put(store, 0, 4)
    scan = os.scandir

    @contextlib.contextmanager
    def early(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scan(path) as entries:
            yield [entry for entry in entries if not entry.name.endswith(".parquet")]

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", early)
        store.committed("rows", KEY)
    assert ids(store, 0, 4) == [0, 1, 2, 3]


# --- the root --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_root_that_cannot_be_written_is_refused_with_its_name(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="root '.*file.*' cannot be .*root=DIR"):
        Store(tmp_path / "file" / below)


def test_a_store_of_another_format_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path)
    (tmp_path / "store" / "FORMAT.json").write_text(json.dumps({"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"store format {FORMAT + 1}, this version reads format {FORMAT}"):
        Store(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_format_file_is_refused(tmp_path: Path, text: str) -> None:
    Store(tmp_path)
    (tmp_path / "store" / "FORMAT.json").write_text(text)
    with pytest.raises(ValueError, match=r"FORMAT\.json is damaged"):
        Store(tmp_path)


# --- small things ----------------------------------------------------------------------------------------------------


def test_small_values_come_back_and_their_damage_is_noticed(store: Store) -> None:
    value = {"values": {"a": 0.1 + 0.2}, "list": [1, None, "text"]}
    assert store.get_json("values", KEY) is None
    store.put_json("values", KEY, value)
    assert store.get_json("values", KEY) == value
    path = store.files.root / f"{store.folder('values', KEY)}.json"
    text = path.read_text()
    for damaged in ("", text[: len(text) // 2], text.replace("text", "next"), "[]", "null", "\x00"):
        path.write_text(damaged)
        assert store.get_json("values", KEY) is None, damaged


def test_arrays_come_back_and_their_damage_is_noticed(store: Store) -> None:
    arrays = {"mean": np.arange(3.0), "square": np.asfortranarray(np.arange(6).reshape(2, 3))}
    assert store.get_arrays("references", KEY) is None
    store.put_arrays("references", KEY, arrays)
    found = store.get_arrays("references", KEY)
    assert found is not None and found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    path = store.files.root / f"{store.folder('references', KEY)}.safetensors"
    data = path.read_bytes()
    for damaged in (b"", data[:30], data[:-1], data[:-1] + bytes([data[-1] ^ 1]), bytes([data[0] ^ 1]) + data[1:]):
        path.write_bytes(damaged)
        assert store.get_arrays("references", KEY) is None


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_store_counts_every_file_and_finds_nothing(store: Store) -> None:
    put(store, 0, 8)
    put(store, 0, 8, kind="columns")
    store.put_json("values", KEY, 1)
    store.put_json("recipes", KEY, 2)
    for kind in ("references", "artifacts", "texts"):
        store.put_arrays(kind, KEY, {"a": np.zeros(1)})
    store.put_json("artifacts", KEY, 3)
    store.quarantine(KEY, 3, "it killed its worker")
    counts, wrong = store.verify()
    files = [path for path in store.files.root.rglob("*") if path.is_file() and path.name != "FORMAT.json"]
    assert (counts["files"], wrong) == (len(files), [])
    assert counts["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_reports_damage_once_and_withdrawing_repairs_it(store: Store, name: str) -> None:
    put(store, 0, 8)
    pattern, damage = DAMAGE[name]
    damage(only(store, pattern))
    (line,) = store.verify()[1]
    assert KEY in line
    assert len(store.verify()[1]) == 1  # looking changes nothing
    assert len(store.verify(withdraw=True)[1]) == 1
    assert store.verify() == ({"files": 0, "bytes": 0}, [])
    assert put(store, 0, 8) and ids(store, 0, 8) == list(range(8))


def test_verify_reports_a_damaged_entry_of_the_quarantine(store: Store) -> None:
    store.quarantine(KEY, 3, "it killed its worker")
    (path,) = (store.files.root / "quarantine").rglob("*.json")
    path.write_bytes(path.read_bytes()[:-5])
    (line,) = store.verify()[1]
    assert line.startswith("quarantine/") and "its row will be tried again" in line and path.exists()
    assert len(store.verify(withdraw=True)[1]) == 1 and not path.exists()


@pytest.mark.parametrize("kind", ["rows", "columns", *SMALL, "quarantine"])
def test_what_writers_left_that_died_is_garbage(store: Store, kind: str) -> None:
    if kind == "quarantine":
        store.quarantine(KEY, 3, "it killed its worker")
    elif kind in TABLES:
        put(store, 0, 8, kind=kind)
    else:
        store.put_json(kind, KEY, 1)
    (path, *_) = (p for p in (store.files.root / kind).rglob("*") if p.is_file() and KEY in str(p))
    kept = {p for p in store.files.root.rglob("*") if p.is_file()}
    left = path.with_name(".tmp-0123")
    left.write_bytes(b"half")
    assert store.collect_garbage(3600.0, False)["files"] == 0 and left.exists()
    assert store.collect_garbage(0.0, False) == {"files": 1, "bytes": 4, "released": 0}
    assert {p for p in store.files.root.rglob("*") if p.is_file()} == kept


@pytest.mark.parametrize("kind", SMALL)
def test_verify_reports_a_damaged_small_file_and_withdrawing_removes_it(store: Store, kind: str) -> None:
    if kind in ("references", "artifacts", "texts"):
        store.put_arrays(kind, KEY, {"a": np.zeros(4)})
    else:
        store.put_json(kind, KEY, {"a": 1})
    (path,) = (store.files.root / kind).rglob(f"{KEY}.*")
    flip(path, path.stat().st_size - 3)
    (line,) = store.verify(withdraw=True)[1]
    assert line.startswith(kind) and "damaged" in line
    assert not path.exists() and store.verify()[1] == []
