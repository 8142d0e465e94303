"""What the verbs of the command line do; those that only look are in ``verbs_look``."""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE, DEGRADED, FAILED, Terminated
from orchestrator.export import export
from orchestrator.progress import COMPANIONS
from orchestrator.verbs_figure import compare, figure
from orchestrator.verbs_likelihood import likelihood
from orchestrator.verbs_look import (
    completion,
    doctor,
    emit,
    gc,
    init,
    listing,
    report,
    root_and_name,
    shard,
    show,
    status,
    verify,
    write_report,
)


def _log_to_stderr() -> None:
    from orchestrator.redact import RedactingFilter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("solvus: %(message)s"))
    handler.addFilter(RedactingFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def _study(args: Any) -> Any:
    from orchestrator import config
    from orchestrator.redact import redact_all

    data = config.compose(args.overrides, args.config_dir)
    if args.cfg:
        from omegaconf import OmegaConf

        shown = redact_all(data)
        print(json.dumps(shown, indent=1) if args.json else OmegaConf.to_yaml(OmegaConf.create(shown)), end="")
        return None
    return config.study(data)


def _foreseen(study: Any, store: Any) -> dict[str, Any]:
    """Check every trial that can be foreseen and add up what they will take."""
    from orchestrator.measure import scorers
    from orchestrator.plan import companions, cut, missing, shards, uncalibrated
    from orchestrator.registries import searches
    from tasks.recipe import Recipe

    artifacts: set[str] = set()
    total = {"trials": 0, "shards": 0, "samples": 0, "samples_to_make": 0, "nfe": 0, "work": 0.0,
             "reward_calls": 0, "raced": 0}  # fmt: skip
    parts: dict[str, dict[str, float]] = {}
    seen: set[tuple[str, int, int]] = set()
    beside: dict[str, list[tuple[int, int]]] = {}  # companion rows that are counted already
    companion_rows = 0
    columns = scorers(study.metrics)
    for proposal in searches.build(study.search).start(study.context()).preview():
        trial = study.trial(total["trials"], proposal)
        total["trials"] += 1
        total["raced"] += proposal.race is not None
        part = parts.setdefault(proposal.part, {"trials": 0, "working": 0, "nfe": 0})
        part["trials"] += 1
        total["samples"] += trial.num_samples
        work = shards(trial.recipe, columns, trial.first_index, trial.stop, study.shard_size, store)
        span = (trial.recipe.key, trial.first_index, trial.stop)
        if span in seen and study.search["name"] in ("single", "grid"):
            continue
        seen.add(span)
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


def run(args: Any) -> int:
    """``solvus run``."""
    from orchestrator import config

    _log_to_stderr()
    study = config.load(args.frozen) if args.frozen else _study(args)
    if study is None:
        return COMPLETE
    summary, lines = launch(study, _command(args))
    emit(args, summary, "\n".join(lines))
    return {"failed": FAILED, "degraded": DEGRADED}.get(summary["state"], COMPLETE)


def launch(study: Any, command: str) -> tuple[dict[str, Any], list[str]]:
    """Run a study to its end, and write its tables, its state and its report.

    Args:
        study: what ``config.study`` returns.
        command: what to type to launch it again, for the report.

    Returns:
        what came of it, as plain data and in lines for people.
    """
    from orchestrator.files import is_remote
    from orchestrator.ledger import Ledger
    from orchestrator.progress import Progress
    from orchestrator.recent import Recent
    from orchestrator.redact import redact
    from orchestrator.registries import executors, trackers
    from orchestrator.results import Results
    from orchestrator.store import Store
    from orchestrator.study import run as run_study

    store = Store(study.root)
    results = Results(study.root, study.name)
    foreseen = _foreseen(study, store)
    if foreseen["samples_to_make"] or foreseen["companions"]:
        from tasks.run import load_model

        load_model(study.recipe)
    results.save_study(study)
    ledger = Ledger(study.price_per_device_hour)
    began = time.monotonic()
    results.save_state("running", {"foreseen": foreseen})
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    executor = executors.build(study.config["executor"]).start(study.name)
    tracker = trackers.build(study.config["tracker"]).start(study)
    recent = Recent()
    logging.getLogger("solvus").addHandler(recent)
    watch = Progress(
        foreseen,
        report=lambda numbers: results.save_state("running", numbers),
        report_s=10.0 if is_remote(study.root) else 2.0,
        load=executor.load,
        spent=ledger.summary,
        goal=study.goal,
        recent=recent,
    )
    trials: list[Any] = []
    finished = False
    try:
        searched = run_study(study, executor, store, tracker, watch, ledger, trials)
        finished = True
    finally:
        watch.close()
        executor.close()
        logging.getLogger("solvus").removeHandler(recent)
        results.save_trials(trials)
        if not finished:
            results.save_state("interrupted", {"trials": watch.finished})
    results.save_search(searched)
    failed = [trial for trial in trials if trial.state == "failed"]
    degraded = [trial for trial in trials if trial.state == "degraded"]
    summary = {
        "study": study.name,
        "state": "failed" if failed else "degraded" if degraded else "complete",
        "trials": len(trials),
        "failed": len(failed),
        "degraded": len(degraded),
        "samples_made": watch.samples,
        "samples_reused": watch.reused,
        "wall_s": round(time.monotonic() - began, 2),
        **{name: round(value, 3) for name, value in ledger.summary().items()},
    }
    results.save_state(str(summary["state"]), summary | {"command": redact(command)})
    path = write_report(study.root, study.name)
    tracker.close(
        {f"study/{name}": value for name, value in summary.items()},
        [("report.html", results.files.read("report.html"))],
    )
    summary["report"] = path
    lines = [
        f"{study.name}: {summary['state']}, {len(trials)} trials ({len(failed)} failed), "
        f"{watch.samples:,} samples made and {watch.reused:,} reused in {summary['wall_s']:.1f} s "
        f"({ledger.spent['nfe']:,.0f} network evaluations, {ledger.spent['reward_calls']:,.0f} reward calls).",
        *(f"  failed {trial.title}: {trial.reason}" for trial in failed),
        *(f"  degraded {trial.title}: rows {list(trial.quarantined)} are quarantined" for trial in degraded),
        f"report: {path}",
    ]
    return summary, lines


def _command(args: Any) -> str:
    """What to type to launch it again."""
    folders = [word for folder in args.config_dir for word in ("--config-dir", folder)]
    frozen = ["--frozen", args.frozen] if args.frozen else []
    return shlex.join(["solvus", "run", *frozen, *folders, *args.overrides])


def _end(signum: int, frame: Any) -> None:
    raise Terminated


def plan(args: Any) -> int:
    """``solvus plan``."""
    from orchestrator.store import Store
    from tasks.types import sample_shape

    study = _study(args)
    if study is None:
        return COMPLETE
    store = Store(study.root)
    total = _foreseen(study, store)
    seconds = _seconds_per_evaluation(study) * total["work"] if total["nfe"] else 0.0
    work = "" if total["work"] == total["nfe"] else f" (as much as {total['work']:,.0f} of the whole one)"
    raced = f"; at most, since {total['raced']:,} of the trials race and may stop early" if total["raced"] else ""
    workers = max(study.config["executor"].get("workers", 1), 1)
    row_bytes = 400 + 5 * math.prod(sample_shape(study.recipe.parts.model))
    data = total | {
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
        f"  device-seconds  about {data['device_s']:,} (timed here), {data['wall_s']:,} on {workers} worker(s)\n"
        f"  money           {data['money']:,}\n"
        f"  disk            about {data['disk_bytes'] / 1e6:,.1f} MB in {study.root}"
    )
    emit(args, data, text)
    return COMPLETE


def _seconds_per_evaluation(study: Any) -> float:
    """Time two batches of the study's model: seconds per row."""
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
            times.append(time.perf_counter() - began)
    return min(times) / recipe.batch_size


def submit(args: Any) -> int:
    """``solvus submit``."""
    from orchestrator import config
    from orchestrator.adapters import ray_jobs

    _log_to_stderr()
    from orchestrator.registries import EVERY

    data = config.compose(args.overrides, args.config_dir)
    if data["executor"]["name"] == "local":
        data["executor"] = EVERY["executor"].defaults("ray") | {"address": "auto", "workers": 0}
    frozen = config.freeze(data)
    study = config.study(frozen)
    return ray_jobs.submit(study.name, frozen, args.address, not args.no_wait, args.attach, args.json)


def chaos(args: Any) -> int:
    """``solvus chaos``."""
    import tempfile

    from orchestrator import chaos as suite

    if args.faults < 1 or args.ray_kills < 0:
        raise ValueError(
            f"--faults must be at least 1 and --ray-kills at least 0, got {args.faults}, {args.ray_kills}."
        )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="solvus-chaos-") as temporary:
        folder = Path(args.keep) if args.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tallies = suite.suite(folder, args.faults, args.ray_kills, args.seed, say)
    together = suite.total(tallies)
    values = {
        "faults": (together.faults, "faults", "higher"),
        "lost": (together.lost, "rows", "lower"),
        "duplicated": (together.duplicated, "rows", "lower"),
        "different": (together.different, "rows", "lower"),
        "wasted_shards_per_kill": (together.recomputed / max(together.killed_workers, 1), "shards", "lower"),
    }
    figures = [{"name": n, "value": v, "unit": unit, "better": better} for n, (v, unit, better) in values.items()]
    from orchestrator.worker import origin

    data = {"figures": figures, "commit": origin()["commit"], "machine": origin()["machine"]}
    emit(args, data, suite.table(tallies))
    broken = together.lost + together.duplicated + together.different
    return FAILED if broken or any(tally.notes for tally in tallies) else COMPLETE


def train(args: Any) -> int:
    """``solvus train``."""
    from tasks.checkpoint import WEIGHTS
    from tasks.registry import unknown
    from tasks.run import use_one_thread
    from tasks.training import classifier, consistency, digits, one_more_step, probes, tokens

    trainers = {
        "digits": digits.train,
        "digits_dit": digits.train,
        "digits_flow": digits.train,
        "digits_classifier": classifier.train,
        "digits_consistency": consistency.train,
        "digits_tokens": tokens.train,
        "digits_tokens_ar": tokens.train,
        "digits_one_more_step": one_more_step.train,
        "digits_dit_probes": probes.train,
    }
    if args.name not in trainers:
        raise unknown("embedded model", args.name, sorted(trainers), "Known")
    options = {name: getattr(args, name) for name in ("steps", "batch_size") if getattr(args, name) is not None}
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    use_one_thread()
    folder = Path(args.out) if args.out else WEIGHTS / args.name
    record = trainers[args.name](
        args.name, folder, seed=args.seed, report=lambda line: print(line, file=sys.stderr, flush=True), **options
    )
    emit(args, record | {"folder": str(folder)}, f"{args.name} saved in {folder} after {record['seconds']} s")
    return COMPLETE


def ui(args: Any) -> int:
    """``solvus ui``."""
    from orchestrator.adapters import pages

    root, _ = root_and_name(args)
    return pages.serve(root, args.port, args.optuna_port)


VERBS = {
    "init": init,
    "run": run,
    "plan": plan,
    "status": status,
    "report": report,
    "figure": figure,
    "compare": compare,
    "verify": verify,
    "gc": gc,
    "chaos": chaos,
    "submit": submit,
    "shard": shard,
    "list": listing,
    "show": show,
    "train": train,
    "likelihood": likelihood,
    "export": export,
    "ui": ui,
    "doctor": doctor,
    "completion": completion,
}
