"""What a study will take, before anything of it is made: every trial that can be foreseen is checked and added up."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.measure import scorers
from orchestrator.plan import companions, cut, missing, shards, uncalibrated
from orchestrator.progress import COMPANIONS
from orchestrator.registries import searches
from tasks.recipe import Recipe
from tasks.room import check_room


def foreseen(study: Any, store: Any) -> dict[str, Any]:
    """Check every trial that can be foreseen and add up what they will take.

    Raises:
        ValueError: one cannot run, or its batches do not fit into the memory of this machine, where they are made.
    """
    # Workers elsewhere have a memory of their own.
    is_here = study.config.get("executor", {}).get("address", "local") == "local"
    artifacts: set[str] = set()
    total = {"trials": 0, "shards": 0, "samples": 0, "samples_to_make": 0, "nfe": 0, "work": 0.0,
             "reward_calls": 0, "raced": 0}  # fmt: skip
    parts: dict[str, dict[str, float]] = {}
    seen: set[tuple[str, int, int]] = set()
    beside: dict[str, list[tuple[int, int]]] = {}  # companion rows that are counted already
    companion_rows = 0
    columns = scorers(study.metrics)
    search = searches.build(study.search).start(study.context())
    for proposal in search.preview():
        trial = study.trial(total["trials"], proposal)
        total["trials"] += 1
        total["raced"] += proposal.race is not None
        part = parts.setdefault(proposal.part, {"trials": 0, "working": 0, "nfe": 0})
        part["trials"] += 1
        total["samples"] += trial.num_samples
        work = shards(trial.recipe, columns, trial.first_index, trial.stop, study.shard_size, store)
        span = (trial.recipe.key, trial.first_index, trial.stop)
        if span in seen and getattr(search, "lists", False):
            continue
        seen.add(span)
        if work.samples and is_here:
            check_room(trial.recipe)
        account = trial.recipe.account
        artifacts.update(uncalibrated(trial.recipe, store))
        total["shards"] += len(work)
        ahead = companions(trial.recipe, columns, trial.first_index, trial.stop, study.shard_size, store)
        for piece in ahead.pieces:
            have = beside.setdefault(piece.key, [])
            for start, stop in missing(piece.start, piece.stop, sorted(have)):
                have.append((start, stop))
                total["shards"] += sum(1 for _ in cut(start, stop, study.shard_size))
                evaluations = (stop - start) * Recipe(**piece.recipe).nfe
                total["nfe"] += evaluations
                total["work"] += evaluations
                companion_rows += stop - start
        part["working"] += work.samples > 0
        part["nfe"] += work.samples * account.nfe
        for piece in work.pieces:
            if piece.rows:
                count = piece.stop - piece.start
                total["samples_to_make"] += count
                total["nfe"] += count * account.nfe
                total["work"] += count * trial.recipe.work
                total["reward_calls"] += count * account.reward_calls
    ahead_nfe = total["nfe"] - sum(part["nfe"] for part in parts.values())
    if ahead_nfe:
        parts[COMPANIONS] = {"trials": 0, "working": 0, "nfe": ahead_nfe}
    return total | {"companions": companion_rows, "calibrations": len(artifacts), "parts": parts}


def seconds_per_evaluation(study: Any) -> float:
    """Time three batches of the study's model: seconds per row of the fastest."""
    import torch

    from tasks.noise import RowNoise
    from tasks.run import load_model, use_one_thread

    use_one_thread()
    recipe = study.recipe
    model = load_model(recipe)
    noise = RowNoise(0, torch.arange(recipe.batch_size, device=recipe.device))
    x = model.process.prior(model.shape, noise)
    cond = torch.zeros(recipe.batch_size, dtype=torch.int64, device=recipe.device) if model.num_classes else None
    times = []
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            model.denoise(x, 0.5, cond)
            if x.is_cuda:  # calls return before they are done
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return min(times) / recipe.batch_size
