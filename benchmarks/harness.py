"""What every benchmark shares: options, the table, and the one JSON line at its end."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import origin

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    better: str  # higher or lower
    wanted: str = ""


def options(description: str) -> argparse.Namespace:
    """``--quick`` measures less, ``--json`` prints the machine-readable line."""
    return arguments(description)


def arguments(description: str, *more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """The same, with a benchmark's own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, settings in more:
        parser.add_argument(flag, **settings)
    parser.add_argument("--quick", action="store_true", help="smaller sizes: a smoke test, not a measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args()


def commit() -> str:
    """The commit that is measured, in short, with a mark when the tree differs from it."""
    head, mark, _ = origin.commit().partition("+changes")
    return head[:7] + mark


def machine() -> str:
    """Processor count and kind, and the accelerator if torch sees one."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no accelerator"
    return f"{os.cpu_count()} cores {platform.machine()}, {gpu}, torch {torch.__version__}"


def publish(figures: list[Figure], as_json: bool) -> None:
    """The table, then the JSON line."""
    print(f"\ncommit {commit()} on {machine()}\n")
    width = max(len(figure.name) for figure in figures)
    for figure in figures:
        print(f"{figure.name:<{width}}  {figure.value:>12.4g} {figure.unit:<10} {figure.wanted}")
    if as_json:
        rows = [{k: v for k, v in asdict(figure).items() if k != "wanted"} for figure in figures]
        print(json.dumps({"figures": rows, "commit": commit(), "machine": machine()}))
