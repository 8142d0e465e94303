"""The verbs of the command line, a module each; heavy imports stay inside the calls."""

from __future__ import annotations

from orchestrator.verbs import (
    chaos,
    compare,
    completion,
    doctor,
    export,
    figure,
    gc,
    init,
    likelihood,
    listing,
    plan,
    report,
    run,
    shard,
    show,
    status,
    submit,
    train,
    ui,
    verify,
)
from orchestrator.verbs.verb import Verb

VERBS: dict[str, Verb] = {
    "init": init.VERB,
    "run": run.VERB,
    "plan": plan.VERB,
    "submit": submit.VERB,
    "status": status.VERB,
    "report": report.VERB,
    "figure": figure.VERB,
    "compare": compare.VERB,
    "verify": verify.VERB,
    "gc": gc.VERB,
    "chaos": chaos.VERB,
    "shard": shard.VERB,
    "list": listing.VERB,
    "show": show.VERB,
    "export": export.VERB,
    "train": train.VERB,
    "likelihood": likelihood.VERB,
    "ui": ui.VERB,
    "doctor": doctor.VERB,
    "completion": completion.VERB,
}
