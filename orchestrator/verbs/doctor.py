"""``solvus doctor``."""

from __future__ import annotations

from typing import Any

from orchestrator.exits import COMPLETE, USAGE
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def call(args: Any) -> int:
    """``solvus doctor``."""
    from orchestrator.doctor import examine, what_to_do

    findings = examine()
    lines = [
        f"{'ok ' if f['ok'] else 'no '} {f['what']:<22} {f['found']}{'' if f['ok'] else '  -> ' + f['fix']}"
        for f in findings
    ]
    emit(args, findings, "\n".join([*lines, "", *what_to_do(findings)]))
    return USAGE if any(f["needed"] and not f["ok"] for f in findings) else COMPLETE


VERB = Verb("what is installed, which accelerator is seen, what is missing, and what to do next", call)
