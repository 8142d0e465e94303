"""``solvus train``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb

MODELS = (
    "digits, digits_flow, digits_classifier, digits_consistency, digits_dit, digits_tokens, digits_tokens_ar, "
    "digits_one_more_step, digits_dit_probes"
)


def options(parser: argparse.ArgumentParser) -> None:
    """Which, and how."""
    parser.add_argument("name")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, help="images of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="where to save; the package's own weights when left out")


def call(args: Any) -> int:
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


VERB = Verb(f"train an embedded model again: {MODELS}", call, options)
