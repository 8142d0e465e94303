"""``solvus status``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """How long to look."""
    parser.add_argument("--follow", action="store_true", help="look at a running study until it ends: stages, speed, "
                        "best values, spending, time left, last errors")  # fmt: skip


def call(args: Any) -> int:
    """``solvus status``."""
    from orchestrator import results

    root, name = root_and_name(args)
    if args.follow:
        return _follow(args, root, name)
    found = []
    for study in [name] if name else results.known(root):
        folder = results.Results(root, study)
        folder.study()
        state = folder.state()
        trials = folder.trials()
        found.append(
            {
                "study": study,
                "state": state["state"],
                "trials": len(trials),
                "failed": sum(row["state"] == "failed" for row in trials),
                "quarantined": {
                    f"{row['key']}/{index}": why
                    for row in trials
                    for index, why in json.loads(row["quarantined"]).items()
                },
                "reasons": [row["reason"] for row in trials if row["state"] == "failed"],
                "summary": state["summary"],
                "report": f"{folder.folder}/report.html",
            }
        )
    lines = []
    for row in found:
        done = f"{row['trials']:>5} trials, {row['failed']} failed"
        going = row["summary"].get("progress") if row["state"] == "running" else None
        lines.append(f"{row['study']:<20} {row['state']:<12} {going or done}")
    for row in found if name else []:
        lines += [f"  failed: {reason}" for reason in row["reasons"][:20]]
        lines += [f"  quarantined {index}: {why}" for index, why in row["quarantined"].items()]
    emit(args, found, "\n".join(lines) or f"no studies in {root}")
    return COMPLETE


def _follow(args: Any, root: str, name: str | None) -> int:
    """Follow the study that was named, or the only one that runs.

    Raises:
        ValueError: none was named, and not exactly one runs.
    """
    from orchestrator import results
    from orchestrator.follow import follow

    if name is None:
        running = [study for study in results.known(root) if results.Results(root, study).state()["state"] == "running"]
        if len(running) != 1:
            which = f"these run: {', '.join(running)}" if running else "none runs"
            raise ValueError(f"--follow needs one study, and in {root} {which}. Say which: study=NAME.")
        (name,) = running
    folder = results.Results(root, name)
    folder.study()
    try:
        return follow(folder, args.json)
    except KeyboardInterrupt:  # the study goes on; only looking at it ended
        return COMPLETE


VERB = Verb("where the studies of a root stand", call, options, takes_settings=True)
