"""What verbs print: their result, a composed configuration, and what is logged meanwhile."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


def emit(args: Any, data: Any, text: str) -> None:
    """Print a result, as text or with ``--json`` as data."""
    print(json.dumps(data, default=str) if args.json else text)


def is_shown(args: Any, data: dict[str, Any]) -> bool:
    """Print a composed configuration without its secrets if ``--cfg`` asks for it, and say whether it did."""
    if args.cfg:
        from omegaconf import OmegaConf

        from orchestrator.redact import redact_all

        shown = redact_all(data)
        print(json.dumps(shown, indent=1) if args.json else OmegaConf.to_yaml(OmegaConf.create(shown)), end="")
    return args.cfg


def log_to_stderr() -> None:
    """Show warnings, without secrets."""
    from orchestrator.redact import RedactingFilter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("solvus: %(message)s"))
    handler.addFilter(RedactingFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
