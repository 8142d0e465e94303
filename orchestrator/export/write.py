"""The folder of an export: the first candidate that equals Solvus's samples, and what was compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from orchestrator.export.candidates import candidates
from orchestrator.export.check import TOLERANCE, Check
from orchestrator.export.point import Point
from orchestrator.export.readme import readme


def write(p: Point, folder: Path) -> dict[str, Any]:
    """Write the folder with the first candidate that equals Solvus's samples; what ``check.json`` holds.

    Where none does, the last one stays, and ``ok`` is false.
    """
    import shutil

    from tasks import calibration

    check = Check(p)
    rejected: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    largest, reason = math.inf, ""
    for candidate in candidates(p):
        if found:  # the one before was not good enough
            rejected.append({"scheduler": found["scheduler"], "reason": reason})
            shutil.rmtree(folder / "scheduler")
        folder.mkdir(parents=True, exist_ok=True)
        candidate.scheduler.save_pretrained(folder / "scheduler")
        largest, reason = check.difference(candidate, folder / "scheduler")
        found = {"scheduler": candidate.name, "set_timesteps": candidate.call, "largest_difference": largest}
        if largest <= TOLERANCE:
            break
    ok = largest <= TOLERANCE
    if not math.isfinite(largest):  # JSON has no infinity
        found["largest_difference"] = None
    found |= {
        "ok": ok,
        "reason": None if ok else reason,
        "tolerance": TOLERANCE,
        "compared": check.compared,
        "rejected": rejected,
    }
    found |= {"recipe": p.recipe.key, "model": p.recipe.model["name"], "revision": p.parts.model.revision}
    files = ["scheduler/scheduler_config.json"]
    if p.schedule is not None:
        (folder / "schedule.json").write_text(p.schedule.to_json() + "\n")
        files.append("schedule.json")
    for place, (meta, arrays) in p.arrays.items():
        calibration.save(folder / f"artifact-{place}.safetensors", meta, arrays)
        files.append(f"artifact-{place}.safetensors")
    found["files"] = [*files, "README.md", "check.json"]
    (folder / "README.md").write_text(readme(p, found, candidate.scheduler))
    (folder / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    return found
