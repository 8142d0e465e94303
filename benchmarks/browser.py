"""A headless Chromium that opens files and tells what a page asked for, complained of, and how soon it was seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AXE = "4.14.1"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAINT = "performance.getEntriesByType('paint').find((e) => e.name === 'first-contentful-paint')?.startTime"


@dataclass
class Watched:
    """A page, with what it asked of any host and what its console said beyond information."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, path: Path) -> float:
        """Open a file; seconds until something was painted."""
        self.page.goto(path.absolute().as_uri(), wait_until="load")
        self.page.wait_for_function(f"{PAINT} !== undefined", timeout=30_000)
        return float(self.page.evaluate(PAINT)) / 1000

    def scroll_through(self) -> None:
        """Bring every figure into view, so that each of them is drawn."""
        for figure in self.page.query_selector_all("figure[data-chart]"):
            figure.scroll_into_view_if_needed()
            self.page.wait_for_function(
                "(f) => f.querySelector('.live .main-svg') !== null", arg=figure, timeout=60_000
            )

    def serious(self, axe: Path) -> list[str]:
        """What axe-core finds serious or critical, one line each."""
        self.page.evaluate(axe.read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{rule['id']}: {rule['help']} ({node['target']})"
            for rule in found
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"][:5]
        ]


def chromium() -> str | None:
    """A browser's program: ``$SOLVUS_CHROMIUM``, one on the path, or playwright's own; None where there is none."""
    named = os.environ.get("SOLVUS_CHROMIUM")
    for name in [named] if named else NAMES:
        if found := shutil.which(name):
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as play:
        own = play.chromium.executable_path
    return own if Path(own).exists() else None


@contextmanager
def browser(program: str) -> Iterator[Any]:
    """A running browser, offline; ``watch`` opens pages in it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield running
        finally:
            running.close()


@contextmanager
def watch(running: Any, **settings: Any) -> Iterator[Watched]:
    """A fresh page (``color_scheme``, ``viewport``, ``java_script_enabled``) whose doings are noted."""
    context = running.new_context(**settings)
    try:
        watched = Watched(context.new_page())
        page = watched.page
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or watched.requests.append(r.url))
        page.on("console", lambda m: m.type in ("error", "warning") and watched.complaints.append(m.text))
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        yield watched
    finally:
        context.close()


def axe_core() -> Path | None:
    """axe-core from npm, kept in the user's cache; None where it can be had neither there nor from the network."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "solvus"
    script = cache / f"axe-core-{AXE}.min.js"
    if script.exists():
        return script
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(
            ["npm", "pack", f"axe-core@{AXE}", "--silent"], cwd=cache, check=True, capture_output=True, timeout=120
        )
        with tarfile.open(cache / f"axe-core-{AXE}.tgz") as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            script.write_bytes(member.read())
    except (OSError, subprocess.SubprocessError, tarfile.TarError, KeyError):
        return None
    return script
