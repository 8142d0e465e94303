"""What guidance, model surgery and savings do to the embedded models: the tables of docs/guidance.md.

    python -m benchmarks.guidance [--samples 256] [--part quality|savings] [--write]

quality: Fréchet distance (classifier features, against all 1,797 digits) and accuracy by the classifier, with standard
errors; savings: evaluations, work, speed-up in CPU seconds and distance to the rows that were made without. Every row
of a table has the same seed and noise. ``--write`` replaces the tables in docs/guidance.md.
"""

from __future__ import annotations

import argparse
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import commit, machine
from tasks import registry
from tasks.moments import Moments, frechet_distance, frechet_influence
from tasks.recipe import Recipe
from tasks.run import generate, score

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guidance.md"


def recipe(model: str = "digits", solver: Any = "ddim", steps: int = 10, **changes: Any) -> Recipe:
    """One trajectory a sample, on a quadratic grid."""
    plain = Recipe(model, solver, {"name": "quadratic", "num_steps": steps}, "none", "single")  # type: ignore[arg-type]
    return plain.completed().override(changes)


def cfgpp(scale: float) -> dict[str, Any]:
    """CFG++ at a scale."""
    return {"guidance": {"name": "cfgpp", "scale": scale}}


def cfg(scale: float) -> dict[str, Any]:
    """Classifier-free guidance at a scale."""
    return {"guidance": {"name": "cfg", "scale": scale}}


def pag(scale: float, layers: list[str]) -> dict[str, Any]:
    """Perturbed attention without labels."""
    return {"labels": None, "guidance": {"name": "pag", "scale": scale, "layers": layers}}


def tuned(bottom: float, steps: int) -> dict[str, Any]:
    """Skip-tuning at a number of steps."""
    return {"steps": steps, "guidance": {"name": "skip_tuning", "bottom": bottom}}


def sada(max_skips: int, max_token_skips: int) -> dict[str, Any]:
    """SADA, step-wise and token-wise."""
    hook = {"name": "sada", "max_skips": max_skips, "max_token_skips": max_token_skips}
    return {"solver": UNIFIED | {"hooks": [hook]}}


DIT: dict[str, Any] = {"model": "digits_dit"}
TAYLOR = {"name": "step_cache", "kind": "taylorseer", "config": {"cache_interval": 3}}
UNIFIED = {"name": "unified", "preset": "dpmpp_2m"}
QUALITY: list[tuple[str, dict[str, Any]]] = [
    ("unguided", {}),
    *((f"CFG, w = {w:g}", cfg(w)) for w in (2.5, 5.0)),
    *((f"CFG++, omega = {w:g}", cfgpp(w)) for w in (0.2, 0.4)),
    ("no labels", {"labels": None}),
    *((f"no labels, PAG in the middle, s = {s:g}", pag(s, [])) for s in (0.5, 1.0)),
    *((f"skip-tuning at 5 steps, rho = {r:g}", tuned(r, 5)) for r in (1.0, 0.95, 0.9)),
]
SAVINGS: list[tuple[str, dict[str, Any]]] = [
    ("SADA, at most 4 skips", sada(4, 0)),
    ("SADA, at most 1 skip", sada(1, 0)),
    *(
        (f"SADA, skips: at most {rows} of a row, {tokens} of a token", DIT | sada(rows, tokens))
        for rows, tokens in ((1, 0), (1, 2), (0, 2), (0, 4))
    ),
    ("int8", {"guidance": "int8"}),
    ("int8, 4 parts of time", {"guidance": {"name": "int8", "groups": 4}}),
    *(
        (f"first-block cache, {v:g}", DIT | {"guidance": {"name": "step_cache", "config": {"threshold": v}}})
        for v in (0.1, 0.2)
    ),
    ("TaylorSeer, interval 3", DIT | {"guidance": TAYLOR}),
    ("pyramid attention broadcast", DIT | {"guidance": {"name": "step_cache", "kind": "pyramid"}}),
    *((f"DeeDiff, {v:g}", DIT | {"guidance": {"name": "deediff", "threshold": v}}) for v in (0.05, 0.1, 0.2)),
    ("RAS, half of the tokens", DIT | {"guidance": "ras"}),
    ("RAS, a quarter", DIT | {"guidance": {"name": "ras", "ratio": 0.25}}),
]


@lru_cache(maxsize=1)
def reference() -> Moments:
    """Features of all digits."""
    images, labels = registry.models.build("digits").reference()
    return Moments.of(score({"name": "classifier"}, images, labels, 0, 256, "cpu"))


def quality(changes: dict[str, Any], count: int) -> list[str]:
    """Cells of one row: evaluations, Fréchet distance, accuracy."""
    made = recipe(**changes)
    made.check()
    rows = generate(made, 0, count)
    features = score({"name": "classifier"}, rows["x0"], rows["label"], 0, 256, "cpu")
    m, r = Moments.of(features), reference()
    value = frechet_distance(m.mean, m.covariance, r.mean, r.covariance)
    spread = frechet_influence(features, m, r.mean, r.covariance).std() / np.sqrt(count)
    right = "" if not made.has_labels else _accuracy(rows)
    return [str(made.nfe), f"{value:.2f} ± {spread:.2f}", right]


def _accuracy(rows: dict[str, np.ndarray]) -> str:
    right = score({"name": "class_correct"}, rows["x0"], rows["label"], 0, 256, "cpu")
    return f"{100 * right.mean():.1f} %"


def savings(changes: dict[str, Any], count: int) -> list[str]:
    """Cells of one row: model, evaluations, work, speed-up, distance."""
    made = recipe(**{"solver": UNIFIED, "steps": 30, "batch_size": 64} | changes)
    made.check()
    spec = registry.features.complete({"name": "acceleration_distance"})
    whole = made.companion(spec)
    assert whole is not None
    (slow, seconds), (fast, less) = _timed(whole, count), _timed(made, count)
    d = score(spec, fast["x0"], fast["label"], 0, 256, "cpu", slow["x0"])[:, 0].astype(np.float64)
    nfe = fast["nfe"].mean()
    work = fast["work"].mean() if "work" in fast else nfe
    model = made.model["name"]
    return [model, f"{nfe:.1f} of {whole.nfe}", f"{work:.1f}", f"{seconds / less:.2f}", f"{np.sqrt(np.mean(d**2)):.3f}"]


_MADE: dict[str, tuple[dict[str, np.ndarray], float]] = {}


def _timed(made: Recipe, count: int) -> tuple[dict[str, np.ndarray], float]:
    """Rows and the least CPU seconds of four runs, calibrations and loading left out."""
    if made.key not in _MADE:
        generate(made, 0, 1)
        taken = []
        for _ in range(4):
            began = time.process_time()
            rows = generate(made, 0, count)
            taken.append(time.process_time() - began)
        _MADE[made.key] = rows, min(taken)
    return _MADE[made.key]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def replaced(page: str, name: str, text: str) -> str:
    """A page with the table between two marks replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


PARTS = (
    ("quality", ["guidance", "evaluations", "Fréchet distance", "accuracy"], QUALITY, quality),
    ("savings", ["saving", "model", "evaluations", "work", "speed-up", "distance"], SAVINGS, savings),
)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--part", choices=["quality", "savings"])
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/guidance.md")
    options = parser.parse_args()
    for part, head, cases, measure in PARTS:
        if options.part in (None, part):
            rows: list[list[str]] = []
            for name, changes in cases:
                rows.append([name, *measure(changes, options.samples)])
                print(" | ".join(rows[-1]), flush=True)
            text = table(head, rows) + f"\n\n{options.samples} samples a row, commit {commit()}, {machine()}."
            if options.write:
                PAGE.write_text(replaced(PAGE.read_text(), part, text))


if __name__ == "__main__":
    main()
