"""``solvus submit``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.printing import is_shown, log_to_stderr
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Where to, and what to wait for."""
    parser.add_argument(
        "--address", help="the cluster's job address, http://HOST:8265; default $RAY_API_SERVER_ADDRESS"
    )
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--attach", action="store_true", help="if the study already runs there, follow it")


def call(args: Any) -> int:
    """``solvus submit``."""
    from orchestrator import config
    from orchestrator.adapters import ray_jobs
    from orchestrator.registries import EVERY

    log_to_stderr()

    data = config.compose(args.overrides, args.config_dir)
    if data["executor"]["name"] == "local":
        data["executor"] = EVERY["executor"].defaults("ray") | {"address": "auto", "workers": 0}
    if is_shown(args, data):
        return COMPLETE
    frozen = config.freeze(data)
    study = config.study(frozen)
    return ray_jobs.submit(study.name, frozen, args.address, not args.no_wait, args.attach, args.json)


VERB = Verb("run a study as a job of a Ray cluster", call, options, takes_settings=True, composes=True)
