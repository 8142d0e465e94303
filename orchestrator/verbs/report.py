"""``solvus report``."""

from __future__ import annotations

from typing import Any

from orchestrator.exits import COMPLETE
from orchestrator.verbs.naming import root_and_name
from orchestrator.verbs.printing import emit
from orchestrator.verbs.verb import Verb


def call(args: Any) -> int:
    """``solvus report``."""
    from dashboards.report import build

    root, name = root_and_name(args)
    if name is None:
        raise ValueError("report needs a study: solvus report study=NAME")
    path = build.write(root, name)
    emit(args, {"report": path}, path)
    return COMPLETE


VERB = Verb("rebuild a study's report from the store", call, takes_settings=True)
