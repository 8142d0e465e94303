"""What the verbs of the command line do; those that only look are in ``verbs_look``."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE, DEGRADED, FAILED
from orchestrator.export import export
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


def run(args: Any) -> int:
    """``solvus run``."""
    from orchestrator import config
    from orchestrator.launch import launch

    _log_to_stderr()
    study = config.load(args.frozen) if args.frozen else _study(args)
    if study is None:
        return COMPLETE
    summary, lines = launch(study, _command(args))
    emit(args, summary, "\n".join(lines))
    return {"failed": FAILED, "degraded": DEGRADED}.get(summary["state"], COMPLETE)


def _command(args: Any) -> str:
    """What to type to launch it again."""
    folders = [word for folder in args.config_dir for word in ("--config-dir", folder)]
    frozen = ["--frozen", args.frozen] if args.frozen else []
    return shlex.join(["solvus", "run", *frozen, *folders, *args.overrides])


def plan(args: Any) -> int:
    """``solvus plan``."""
    from orchestrator.foreseen import foreseen, seconds_per_evaluation
    from orchestrator.store import Store
    from tasks.types import sample_shape

    study = _study(args)
    if study is None:
        return COMPLETE
    store = Store(study.root)
    total = foreseen(study, store)
    seconds = seconds_per_evaluation(study) * total["work"] if total["nfe"] else 0.0
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
