"""The notebooks of the documentation: stripped of outputs, and run from top to bottom in a kernel of their own."""

from __future__ import annotations

import asyncio
import os
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_begins_with_its_title(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in code:
        compile(cell.source, path.name, "exec")
        assert max(map(len, cell.source.splitlines())) <= 120


def _executed(path: Path, folder: Path) -> Any:
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Jupyter's own machinery; the cells run in another process
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            client = NotebookClient(notebook, timeout=600, kernel_name="python3")
            client.execute(cwd=str(folder))
        finally:
            asyncio.set_event_loop(None)
            loop.close()
    return notebook


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = _executed(path, tmp_path)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert last.outputs, "it ends with something to see"
    shown = {
        kind for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs for kind in o.get("data", {})
    }
    if path.stem != "search":
        assert "image/png" in shown, "samples are seen"
