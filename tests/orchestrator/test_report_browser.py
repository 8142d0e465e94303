"""The report in a real browser: nothing asked of a network, nothing complained of, and everything can be operated.

Needs Chromium (``$SOLVUS_CHROMIUM``, one on the path, or ``playwright install chromium``).
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser import axe_core, browser, chromium, watch
from benchmarks.report import synthesise
from dashboards.report import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no browser: install chromium, or set SOLVUS_CHROMIUM"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small study of digits with a search, held-out samples and quarantined rows."""
    root = tmp_path_factory.mktemp("report")
    synthesise(root, trials=40, rows_each=80)
    return Path(build.write(str(root), "large"))


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    program = chromium()
    assert program is not None
    with browser(program) as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_asks_for_nothing_complains_of_nothing_and_is_accessible(
    running: Any, report: Path, scheme: str
) -> None:
    with watch(running, color_scheme=scheme) as watched:
        watched.open(report)
        watched.scroll_through()
        axe = axe_core()
        assert watched.requests == [] and watched.complaints == []
        if axe is None:
            pytest.skip("axe-core can be had neither from the cache nor from npm")
        assert watched.serious(axe) == []


def test_figures_are_seen_without_javascript_and_in_print(running: Any, report: Path) -> None:
    with watch(running, java_script_enabled=False) as watched:
        watched.page.goto(report.as_uri())
        stills = watched.page.query_selector_all(".still svg")
        assert len(stills) >= 4 and all(still.is_visible() for still in stills)
        assert "needs JavaScript" in watched.page.inner_text("#browser ~ noscript, noscript")
    with watch(running) as watched:
        watched.open(report)
        watched.scroll_through()
        assert not watched.page.query_selector(".still svg").is_visible()
        watched.page.emulate_media(media="print")
        assert all(still.is_visible() for still in watched.page.query_selector_all(".still svg"))


def test_a_phone_sees_the_whole_width(running: Any, report: Path) -> None:
    with watch(running, viewport={"width": 360, "height": 740}) as watched:
        watched.open(report)
        watched.scroll_through()
        assert watched.page.evaluate("document.documentElement.scrollWidth") == 360


def test_tables_copy_and_figures_save(running: Any, report: Path, tmp_path: Path) -> None:
    with watch(running, permissions=["clipboard-read", "clipboard-write"]) as watched:
        page = watched.page
        watched.open(report)
        page.get_by_role("region", name="All trials").locator("..").get_by_text("Copy as CSV").click()
        page.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()").startswith("#,part,solver,grid,strategy,NFE")
        with page.expect_download() as told:
            page.locator("button[data-save]").first.click()
        told.value.save_as(tmp_path / "saved.svg")
        saved = ET.parse(tmp_path / "saved.svg").getroot()
        assert saved.tag.endswith("svg") and "color" in (saved.get("style") or "")
        assert watched.complaints == []


def test_the_sample_browser_sorts_filters_and_sets_two_trials_side_by_side(running: Any, report: Path) -> None:
    island = re.findall(r'id="samples">(.*?)</script>', report.read_text(), re.S)[0]
    trials = json.loads(island)["trials"]
    a = next(i for i, trial in enumerate(trials) if trial["first"] == 0)
    b = next(i for i, trial in enumerate(trials) if trial["first"] == 0 and i != a)
    held = next(i for i, trial in enumerate(trials) if trial["first"] > 0)
    with watch(running) as watched:
        page = watched.page
        watched.open(report)

        def cards() -> list[str]:
            return page.locator(".cards li").all_inner_texts()

        page.select_option("[name=a]", str(a))
        page.select_option("[name=by]", "a:ink")
        page.select_option("[name=order]", "-1")
        shown = [int(re.findall(r"#(\d+)", card)[0]) for card in cards()]
        ink = trials[a]["scores"]["ink"]
        assert shown == sorted(range(80), key=lambda i: (-ink[i], i))[:60]
        page.fill("[name=filter]", "3")
        assert {int(re.findall(r"label (\d+)", card)[0]) for card in cards()} == {3} and len(cards()) == 8
        page.fill("[name=filter]", "")
        page.select_option("[name=b]", str(b))
        page.select_option("[name=by]", "d:ink")
        gaps = [x - y for x, y in zip(ink, trials[b]["scores"]["ink"], strict=True)]
        shown = [int(re.findall(r"#(\d+)", card)[0]) for card in cards()]
        assert shown == sorted(range(80), key=lambda i: (-gaps[i], i))[:60]
        assert page.locator(".cards li").first.locator("[role=img]").count() == 2
        page.select_option("[name=b]", str(held))
        assert "share none of the indices" in page.inner_text("[role=status]")
        assert watched.complaints == []
