"""Listing a folder that others write into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.files import LocalFiles


def test_a_file_that_vanishes_while_its_folder_is_listed_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(tmp_path)
    for name in ("a", "b", "c", "d"):
        files.write(f"folder/{name}", b"12")
    scan = os.scandir

    class Scan:
        """Removes a file after the folder was read and before that file is looked at."""

        def __init__(self, path: Path) -> None:
            with scan(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)
            (tmp_path / "folder" / "b").unlink()

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *ended: object) -> None:
            """Nothing to close."""

    monkeypatch.setattr(os, "scandir", Scan)
    assert sorted(files.entries("folder")) == [("a", 2), ("c", 2), ("d", 2)]
