"""``solvus export``: hands a point of a study to diffusers, as a scheduler folder that is checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE, FAILED
from orchestrator.verbs.printing import emit, is_shown
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument("--out", metavar="DIR", required=True, help="a new folder")


def call(args: Any) -> int:
    """``solvus export``."""
    from orchestrator import config
    from orchestrator.export.point import point
    from orchestrator.export.readme import judged
    from orchestrator.export.write import write

    numbers = [item for item in args.overrides if item.startswith("trial=")]
    data = config.compose([item for item in args.overrides if item not in numbers], args.config_dir)
    if is_shown(args, data):
        return COMPLETE
    folder = Path(args.out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {args.out!r} exists and is not an empty folder. Give a new one.")
    root = config.root_of(data)
    recipe = _of_trial(root, str(data["name"]), numbers[-1]) if numbers else config.study(data).recipe
    found = write(point(recipe, root), folder)
    lines = [
        f"{found['scheduler']} in {folder}: {judged(found)}",
        *(f"  not {gone['scheduler']}: {gone['reason']}" for gone in found["rejected"]),
        f"  files: {', '.join(found['files'])}",
    ]
    if not found["ok"]:
        lines[0] = f"export FAILED: {lines[0]}"
    emit(args, found | {"folder": str(folder)}, "\n".join(lines))
    return COMPLETE if found["ok"] else FAILED


def _of_trial(root: str, name: str, text: str) -> Any:
    """The recipe of a trial of a finished study.

    Raises:
        ValueError: there is no such trial, or it never had a recipe that could run.
    """
    from orchestrator.results import Results
    from orchestrator.store import Store
    from tasks.recipe import Recipe

    results = Results(root, name)
    results.study()
    rows = {row["number"]: row for row in results.trials()}
    number = text.partition("=")[2]
    if number == "best":
        number = str(results.best()["number"])
    if not number.isdigit() or int(number) not in rows:
        raise ValueError(f"study {name} has no trial {number!r}. It has {_span(sorted(rows))}, and best.")
    row = rows[int(number)]
    saved = Store(root, create=False).get_json("recipes", row["key"])
    if saved is None:
        raise ValueError(
            f"trial {number} of {name} left no recipe in the store ({row['state']} {row['reason']}). Choose another."
        )
    recipe = Recipe(**saved)
    if recipe.key != row["key"]:
        raise ValueError(
            f"the recipe of trial {number} is {recipe.key} here, but was {row['key']}: the model's weights changed. "
            "Run the study again."
        )
    return recipe


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


VERB = Verb(
    "a recipe, or trial=N (or trial=best) of a finished study, as a diffusers scheduler that is checked",
    call,
    options,
    takes_settings=True,
    composes=True,
)
