"""The reference of the site: a page for every plug-in, from the registries, and one of the command line."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from orchestrator import cli
from orchestrator.registries import EVERY

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reference.py"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    return reference.pages()


def test_every_plug_in_has_a_page_with_its_fields_and_its_source(pages: dict[str, str]) -> None:
    for kind, registry in EVERY.items():
        index = pages[f"reference/{kind}/index.md"]
        for name in registry.names():
            page = pages[f"reference/{kind}/{name}.md"]
            assert page.startswith(f"# {name}\n") and "\n## Reference\n" in page, name
            assert f"[{name}]({name}.md)" in index
            for field in fields(registry.get(name)):
                assert f"| `{field.name}` |" in page, (name, field.name)


def test_code_is_code_and_tables_are_whole(pages: dict[str, str]) -> None:
    for uri, page in pages.items():
        assert "``" not in page.replace("```", ""), uri
        for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(cells) == 1, (uri, table)


def test_markdown_leaves_formulas_alone_and_escapes_the_rest(reference: ModuleType) -> None:
    text = "a_b and ``x_s = *y*\nz`` of :class:`Noise`, p < q.\n\n    x_t = *y* | z"
    wanted = "a\\_b and `x_s = *y*\nz` of `Noise`, p \\< q.\n\n    x_t = *y* | z"
    assert reference._markdown(text) == wanted


@pytest.mark.parametrize(
    ("row", "name"),
    [("GHVB 1.8", "ghvb"), ("DPM-Solver-v3, order 2", "dpm_solver_v3"), ("ddim, eta 1", "ddim"), ("`heun`", "heun")],
)
def test_a_measured_row_is_found_by_what_people_call_the_method(reference: ModuleType, row: str, name: str) -> None:
    assert reference._same(f"| {row} | 1.0 |", name)


def test_a_preset_is_not_taken_for_the_solver_whose_name_it_begins_with(reference: ModuleType) -> None:
    assert not reference._same("| dpmpp_2m_sde | 1.0 |", "dpmpp_2m")


def test_measurements_stand_beside_the_method(pages: dict[str, str]) -> None:
    assert (
        "## Measured" in pages["reference/solver/ddim.md"] and "(../../solvers.md)" in pages["reference/solver/ddim.md"]
    )


def test_the_command_line_page_has_every_verb_and_option(pages: dict[str, str]) -> None:
    page = pages["reference/cli.md"]
    for name, verb in cli.verbs_of(cli.parser()).items():
        assert f"## solvus {name}\n" in page
        for action in verb._actions:
            assert all(option in page for option in action.option_strings if option not in ("-h", "--help"))
