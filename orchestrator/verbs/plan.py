"""``solvus plan``."""

from __future__ import annotations

import math
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit, is_shown
from orchestrator.verbs.verb import Verb


def call(args: Any) -> int:
    """``solvus plan``."""
    from orchestrator import config
    from orchestrator.foreseen import foreseen, seconds_per_evaluation
    from orchestrator.store import Store
    from tasks.types import sample_shape

    data = config.compose(args.overrides, args.config_dir)
    if is_shown(args, data):
        return COMPLETE
    study = config.study(data)
    store = Store(study.root)
    total = foreseen(study, store)
    seconds = seconds_per_evaluation(study) * total["work"] if total["nfe"] else 0.0
    work = "" if total["work"] == total["nfe"] else f" (as much as {total['work']:,.0f} of the whole one)"
    raced = f"; at most, since {total['raced']:,} of the trials race and may stop early" if total["raced"] else ""
    workers = max(study.config["executor"].get("workers", 1), 1)
    row_bytes = 400 + 5 * math.prod(sample_shape(study.recipe.parts.model))
    found = total | {
        "study": study.name,
        "device_s": round(seconds, 1),
        "wall_s": round(seconds / workers, 1),
        "money": round(seconds / 3600 * study.price_per_device_hour, 4),
        "disk_bytes": (total["samples_to_make"] + total["companions"]) * row_bytes,
    }
    text = (
        f"{study.name}: {study.question or 'no question given'}\n"
        f"  trials          {total['trials']:,}\n"
        f"  samples         {total['samples']:,}, of which the store has "
        f"{total['samples'] - total['samples_to_make']:,}\n"
        f"  shards to run   {total['shards']:,}\n"
        f"  companions      {total['companions']:,} samples of other recipes to make first, to compare with\n"
        f"  calibrations    {total['calibrations']:,} to make first, whose cost is not foreseen\n"
        f"  evaluations     {total['nfe']:,} of the network{work}, {total['reward_calls']:,} of rewards inside "
        f"strategies{raced}\n"
        f"  device-seconds  about {found['device_s']:,} (timed here), {found['wall_s']:,} on {workers} worker(s)\n"
        f"  money           {found['money']:,}\n"
        f"  disk            about {found['disk_bytes'] / 1e6:,.1f} MB in {study.root}"
    )
    emit(args, found, text)
    return COMPLETE


VERB = Verb(
    "dry run: trials, shards, samples, evaluations, time, money, and what the store already has",
    call,
    takes_settings=True,
    composes=True,
)
