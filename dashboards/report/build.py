"""Build a study's report: one HTML file that opens from disk without a network."""

from __future__ import annotations

import base64
import gzip
import json
import time
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from dashboards.report import cost, provenance, samples, scaling, schedules, search, trials, won
from dashboards.report.study import Section, StudyView, open_view
from dashboards.report.svg import draw
from orchestrator.results import Results


def write(root: str, name: str) -> str:
    """Write ``studies/NAME/report.html`` and return its place.

    Raises:
        ValueError: there is no such study.
    """
    page = render(open_view(root, name))
    results = Results(root, name)
    results.files.write("report.html", page.encode())
    return f"{results.folder}/report.html"


def sections(view: StudyView, pictures: bool = True) -> list[Section]:
    """Everything there is to say, in the order in which it is asked; the samples themselves only where wanted."""
    seen = (
        ("the sample grids", lambda: samples.strips(view)),
        ("the sample browser", lambda: samples.browser(view)),
    )
    parts = (
        ("what won", lambda: won.section(view, *search.answers(view))),
        ("what it cost", lambda: cost.section(view)),
        ("quality against cost", lambda: cost.fronts(view)),
        ("schedules", lambda: schedules.section(view)),
        ("the searches", lambda: search.sections(view)),
        ("scaling", lambda: scaling.sections(view)),
        ("best of N", lambda: trials.candidates(view)),
        *(seen if pictures else ()),
        ("the table of trials", lambda: trials.section(view)),
        ("failures", lambda: trials.troubles(view)),
        ("provenance", lambda: provenance.section(view)),
    )
    return [section for what, make in parts for section in view.attempt(what, make)]


def render(view: StudyView) -> str:
    """The page; a study without results says so instead of breaking."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    found = sections(view)
    charts = [chart for section in found for chart in section.charts]
    browsers = [section.browser for section in found if section.browser]
    return environment.get_template("page.html").render(
        view=view,
        sections=found,
        draw=draw,
        asked=_asked(view),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        charts=_json([chart.plotly() for chart in charts]),
        browser=_json(browsers[0] if browsers else None),
        plotly=_plotly() if charts else "",
    )


def _asked(view: StudyView) -> str:
    """What was asked, in a line: model, search, samples, metrics."""

    def names(spec: Any) -> str:
        return spec if isinstance(spec, str) else str((spec or {}).get("name", "unknown"))

    config = view.config
    if not config:
        return ""
    metrics = ", ".join(dict.fromkeys(names(spec) for spec in config.get("metrics") or [])) or "none"
    samples_each = config.get("num_samples", "an unknown number of")
    return (
        f"Model {names(config.get('model'))}, search {names(config.get('search'))}, {samples_each} samples a trial "
        f"where a trial says nothing else, seed {config.get('seed', 'unknown')}. Metrics: {metrics}."
    )


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@lru_cache(maxsize=1)
def _plotly() -> str:
    """Plotly's library, packed: a third of the size, and nothing to parse until a figure comes into view."""
    library = resources.files("plotly").joinpath("package_data/plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(library, 6, mtime=0)).decode()
