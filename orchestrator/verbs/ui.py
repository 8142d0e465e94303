"""``solvus ui``."""

from __future__ import annotations

import argparse
from typing import Any

from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.verb import Verb


def options(parser: argparse.ArgumentParser) -> None:
    """Where the pages are."""
    parser.add_argument("--port", type=int, default=5000, help="MLflow's port (default 5000)")
    parser.add_argument("--optuna-port", type=int, default=8080, help="optuna-dashboard's port (default 8080)")


def call(args: Any) -> int:
    """``solvus ui``."""
    from orchestrator.adapters import pages

    root, _ = root_and_name(args)
    return pages.serve(root, args.port, args.optuna_port)


VERB = Verb("MLflow's pages and optuna-dashboard over a root, on this machine only", call, options, takes_settings=True)
